"use strict";
// The interactive map. Hover or tap shows an image and its neighbours, a click holds it, and a key of the legend singles
// out a group or class. All names are inserted as text. The data are those of lib/reporting/image_findings.py.
(() => {
  const element = id => document.getElementById(id);
  const data = JSON.parse(element("map-data").textContent);
  const canvas = element("map-canvas"), panel = element("map-shown"), legend = element("map-legend");
  const pen = canvas.getContext("2d"), sprite = new Image(), most = 24, margin = 10;
  let by = "group", only = -1, shown = -1, held = false, scale = 1;

  const name = value => by === "group" ? `group ${value}` : data.classes[value];
  const colour = value => `hsl(${(value * 137.5) % 360} 70% ${40 + (value % 3) * 9}%)`;
  const place = i => [margin + data.x[i] * scale, margin + (1 - data.y[i]) * scale];

  function dot(i, radius) {
    pen.beginPath();
    pen.arc(...place(i), radius, 0, 7);
    pen.fill();
  }

  function draw() {
    const side = canvas.clientWidth, ratio = window.devicePixelRatio || 1, values = data[by];
    scale = side - 2 * margin;
    canvas.width = canvas.height = Math.round(side * ratio);
    pen.scale(ratio, ratio);
    const radius = Math.max(1.8, side / 8 / Math.sqrt(values.length + 100));
    for (const front of [false, true])  // what is singled out lies on top
      for (let i = 0; i < values.length; i++)
        if ((only < 0 || values[i] === only) === front) {
          pen.globalAlpha = front ? 0.85 : 0.3;
          pen.fillStyle = front ? colour(values[i]) : "#9aa1ab";
          dot(i, radius);
        }
    if (shown < 0) return;
    pen.globalAlpha = 1;
    pen.strokeStyle = pen.fillStyle = getComputedStyle(canvas).color;
    for (const j of data.near[shown]) {
      pen.beginPath();
      pen.moveTo(...place(shown));
      pen.lineTo(...place(j));
      pen.stroke();
      dot(j, radius + 1);
    }
    dot(shown, radius + 3);
  }

  function text(tag, content) {
    const made = document.createElement(tag);
    made.textContent = content;
    return made;
  }

  function picture(i) {
    const made = document.createElement("canvas"), side = data.side;
    made.width = made.height = side;
    const left = i % data.columns, top = Math.floor(i / data.columns);
    made.getContext("2d").drawImage(sprite, left * side, top * side, side, side, 0, 0, side, side);
    return made;
  }

  function show(i, hold) {
    shown = i;
    held = hold;
    draw();
    panel.replaceChildren();
    if (i < 0) {
      panel.append(text("p", "Hover over a point or tap it to see the image and its neighbours. A click holds it."));
      return;
    }
    const words = text("p", data.name[i]), near = document.createElement("div");
    const label = data.label ? `, labelled ${data.classes[data.label[i]]}` : "";
    words.append(document.createElement("br"), text("small", `group ${data.group[i]}${label}`));
    data.near[i].forEach((j, rank) => {
      const button = text("button", data.alike[i][rank].toFixed(2));
      button.prepend(picture(j));
      button.title = data.name[j];
      button.onclick = () => show(j, true);
      near.append(button);
    });
    panel.append(picture(i), words, text("p", "Most similar, with their similarity:"), near);
  }

  function nearest(event) {
    let best = -1, least = 24 ** 2;  // no farther than a fingertip
    for (let i = 0; i < data.x.length; i++) {
      if (only >= 0 && data[by][i] !== only) continue;
      const [x, y] = place(i), distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  function keys() {
    const counts = new Map();
    for (const value of data[by]) counts.set(value, (counts.get(value) || 0) + 1);
    const listed = [...counts].sort((a, b) => b[1] - a[1]);
    legend.replaceChildren(...listed.slice(0, most).map(([value, count]) => {
      const button = text("button", `${name(value)} (${count})`), swatch = document.createElement("i");
      swatch.style.background = colour(value);
      button.prepend(swatch);
      button.setAttribute("aria-pressed", only === value);
      button.onclick = () => { only = only === value ? -1 : value; keys(); show(-1, false); };
      return button;
    }));
    if (listed.length > most) legend.append(text("span", `and ${listed.length - most} more`));
  }

  canvas.onpointermove = event => {
    if (held || event.pointerType === "touch") return;
    const i = nearest(event);
    if (i !== shown) show(i, false);
  };
  canvas.onpointerdown = event => { const i = nearest(event); show(i, i >= 0); };
  if (data.label) element("map-by").onchange = event => { by = event.target.value; only = -1; keys(); draw(); };
  sprite.onload = () => show(shown, held);
  sprite.src = `data:image/jpeg;base64,${data.sprite}`;
  element("map-still").hidden = true;
  element("map-live").hidden = false;
  keys();
  show(-1, false);
  new ResizeObserver(draw).observe(canvas);
})();
