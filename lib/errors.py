"""Errors that the program reports in one sentence; ``main.py`` turns each type into an exit status."""


class UsageError(Exception):
    """Input that cannot be used. The message is one sentence for the user: what is wrong, where, and how to fix it."""


class ReportedElsewhereError(UsageError):
    """A ``UsageError`` whose message rank 0 prints for all ranks."""


class NonFiniteLossError(Exception):
    """The loss or the weights are NaN or infinite. The message names the step, the learning rate and the samples."""


OUT_OF_MEMORY = "DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED"
"""Texts of errors without a type of their own: of PyTorch on the host, of the CUDA runtime, of cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    kind, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(mark in text for mark in OUT_OF_MEMORY)
