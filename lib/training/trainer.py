"""The algorithm of the paper: rounds of discovery and training, from sure anchors to all.

    round 0                every sample is its own neighbourhood
    round r >= 1           entropies from the memory bank -> the int(N * select_rate * r) samples of lowest
                           entropy become anchors, each with its k nearest neighbours -> train on those
    in every round         epochs of steps; the learning rate and the best accuracy start again

Letters: B batch, b images of it of this process, N samples, D embedding, K neighbours.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from lib.distributed.processes import World
from lib.distributed.signals import Stopped
from lib.errors import NonFiniteLossError
from lib.method import diagnostics
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.neighbourhoods import consistency, num_anchors
from lib.seeding import Stream, seed_for
from lib.session.console import logger, progress
from lib.training import optim
from lib.training.checkpoint import TrainingState
from lib.training.plan import Helpers, Plan
from lib.training.recorder import finish_epoch, finish_round, report_epoch, save

CHECKED = 100
"""Steps on a GPU after which it is asked whether all losses were finite."""


def run(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Trains from where ``state`` is to the end of the last round.

    Raises:
        Stopped: from outside; the state is saved, as it is between two steps.
        NonFiniteLossError: the last checkpoint is from before that.
    """
    try:
        run_rounds(state, plan, helpers)
    except Stopped:
        helpers.interrupts.settle()
        save(state, helpers, is_best=False)
        raise


def run_rounds(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """The rounds that are left."""
    if state.round == plan.rounds - 1 and state.epoch >= plan.epochs:
        logger().info("all rounds are done; raise --max-round or --max-epoch to go on")
    while state.round < plan.rounds:
        if state.epoch == state.step == 0:
            start_round(state, plan, helpers)
        found = state.neighbourhoods
        if state.round:
            helpers.on_discovery(state.round, found)  # also where it goes on: TensorBoard hides what it said before
        scalars = {"ANs/Number": found.num_anchors, "ANs/Consistency": found.consistency}
        helpers.session.write_scalars(scalars, state.round)
        while state.epoch < plan.epochs:
            helpers.interrupts.check()
            run_epoch(state, plan, helpers)
        with helpers.interrupts.shield():
            finish_round(state, helpers)
            state.round, state.epoch = state.round + 1, 0


def start_round(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Finds the anchors of the round and their neighbours; the best accuracy starts again."""
    bank, started = state.bank.rows, time.perf_counter()
    state.acc = state.best_acc = None
    if state.round == 0:
        return
    anchors = num_anchors(bank.samples, plan.select_rate, state.round)
    found = discover(bank, temperature=state.bank.temperature, anchors=anchors, size=plan.size)
    if helpers.labels is not None:
        found = replace(found, consistency=consistency(found.anchors, found.neighbours, helpers.labels))
    state.neighbourhoods = found
    logger().info(
        "round %d: %d anchors of %d samples%s (discovery took %.1f s)",
        state.round,
        found.num_anchors,
        bank.samples,
        "" if found.consistency is None else f", consistency {found.consistency:.1%}",
        time.perf_counter() - started,
    )


def run_epoch(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """One pass over the training images, then the accuracy, the records and the checkpoint."""
    rate, started, seen = plan.learning_rate(state.epoch), time.perf_counter(), state.seen if state.step else 0
    optim.set_learning_rate(state.optimizer, rate)
    loss = train_epoch(state, plan, helpers)
    helpers.interrupts.check()
    trained, bank = time.perf_counter(), state.bank.rows
    helpers.world.follow(state.network.buffers())  # of batch normalisation: each process has its own statistics
    figures, measured = diagnostics.measure(
        bank, state.health, round=state.round, temperature=state.bank.temperature, size=plan.size
    )
    accuracy = helpers.evaluate(state.network, bank) if helpers.evaluate else None
    held_out = helpers.validate(state.network, bank) if helpers.validate else None
    times = {
        "images_per_s": (state.seen - seen) / (trained - started),
        "train_s": trained - started,
        "evaluate_s": time.perf_counter() - trained,
    }
    helpers.interrupts.check()
    with helpers.interrupts.shield():  # from here to the checkpoint, for all of it belongs together
        state.health = measured
        trained_by = {"loss": loss, "learning_rate": rate}
        record, is_best = finish_epoch(state, accuracy, held_out, trained_by, {**figures, **times})
        report_epoch(record, accuracy, plan, helpers)
        save(state, helpers, is_best)


def train_epoch(state: TrainingState, plan: Plan, helpers: Helpers) -> float:
    """Mean loss over the training images while the network learns from them, from the state's step on.

    ``iter_size`` batches make one optimiser step on the mean of their losses; so does what is left over at
    the end. The memory bank is updated after each batch's backward pass, which needs it as it was.

    Raises:
        Stopped: from outside; the state is as it is after a step of the optimiser.
        NonFiniteLossError: unless such batches are left out.
    """
    batches, device, shown = helpers.batches, state.bank.memory.device, 0.0
    first, steps = state.step, len(batches)
    if first == 0:
        state.total, state.seen, state.skipped = torch.zeros((), device=device), 0, 0
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    spoilt = torch.full((), -1, device=device)  # the first step whose loss was not finite
    where = f"round {state.round}/{plan.rounds - 1} epoch {state.epoch + 1}/{plan.epochs}"
    with helpers.interrupts.shield():
        bar = progress(batches.epoch(state.round, state.epoch, first), where, "batch", steps - first)
        for number, (images, index) in enumerate(bar, start=first):
            loss = train_step(state, plan, helpers.world, images, index, number, steps)
            done, saves, asked = number + 1, False, helpers.interrupts.asked()
            if done % plan.iter_size == 0 or done == steps:
                state.step = done
                saves = plan.ckpt_every > 0 and done < steps and done // plan.iter_size % plan.ckpt_every == 0
            if not plan.skip_nonfinite:
                spoilt = torch.where((spoilt < 0) & ~loss.isfinite(), number, spoilt)
                if device.type == "cpu" or done % CHECKED == 0 or done == steps or saves or asked:
                    refuse_nonfinite(state, helpers, int(spoilt))  # waits for the device
            if done == steps or saves or asked:
                refuse_nonfinite_weights(state, number)
            if saves:
                save(state, helpers, is_best=False)
            if asked and state.step == done:
                break
            if not bar.disable and number % plan.display_freq == 0 and time.monotonic() - shown > bar.mininterval:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)  # waits for the device
                shown = time.monotonic()
    return state.total.item() / max(1, state.seen)


def train_step(
    state: TrainingState,
    plan: Plan,
    world: World,
    images: torch.Tensor,
    index: torch.Tensor,
    number: int,
    steps: int,
) -> torch.Tensor:
    """One batch, and where it is the last of its group a step of the optimiser; the loss.

    Each process embeds its share of the images. From there on all know the whole batch, and their loss is the same.
    """
    device = images.device
    other = [world.rank] if world.rank else []
    torch.manual_seed(seed_for(state.seed, Stream.STEPS, state.round, state.epoch, number, *other))  # for dropout
    statistics = [buffer.clone() for buffer in state.network.buffers()] if plan.skip_nonfinite else []
    with torch.autocast(device.type, plan.autocast, enabled=plan.autocast is not None):
        own = state.network(images)  # (b, D), float32
    embeddings = world.gather(own, world.shares(len(index)))  # (B, D)
    loss = neighbourhood_loss(
        embeddings, state.bank.rows, state.neighbourhoods.of(index), temperature=state.bank.temperature
    )
    if plan.skip_nonfinite and not loss.isfinite():  # waits for the device
        state.skipped += 1
        for buffer, before in zip(state.network.buffers(), statistics, strict=True):
            buffer.copy_(before)  # batch normalisation has taken note of the batch already
    else:
        group_start = number - number % plan.iter_size
        state.scaler.scale(loss / min(plan.iter_size, steps - group_start)).backward()
        state.bank.update(embeddings.detach(), index)
        state.total += loss.detach() * len(index)
        state.seen += len(index)
    if (number + 1) % plan.iter_size == 0 or number + 1 == steps:
        if any(parameter.grad is not None for parameter in state.network.parameters()):  # all of it may be left out
            world.sum_gradients(state.network.parameters())
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def refuse_nonfinite(state: TrainingState, helpers: Helpers, step: int) -> None:
    """NonFiniteLossError where ``step`` is one, and not -1."""
    if step < 0:
        return
    samples = ", ".join(map(str, helpers.batches.indices(state.round, state.epoch, step)))
    rate = state.optimizer.param_groups[0]["lr"]
    raise NonFiniteLossError(
        f"the loss is not a finite number in round {state.round}, epoch {state.epoch + 1}, step {step + 1}, at a "
        f"learning rate of {rate:g}, for the training images {samples}; lower --base-lr, look at these images, or "
        "leave such batches out with --on-nonfinite skip; the last checkpoint is from before"
    )


def refuse_nonfinite_weights(state: TrainingState, step: int) -> None:
    """NonFiniteLossError where a gradient has spoilt the network though all losses were finite; before it is saved."""
    if not torch.stack([parameter.isfinite().all() for parameter in state.network.parameters()]).all():
        raise NonFiniteLossError(
            f"the network's weights are not finite numbers after round {state.round}, epoch {state.epoch + 1}, step "
            f"{step + 1}, at a learning rate of {state.optimizer.param_groups[0]['lr']:g}; lower --base-lr; the last "
            "checkpoint is from before"
        )
