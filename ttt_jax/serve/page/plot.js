// A line plot on a canvas: axes with ticks and labels, lines, bands between lines, vertical marks.

const LEFT = 52;
const RIGHT = 18;
const BOTTOM = 38;
const LINE = 14; // pixels that a line of text takes
const ROWS = 3; // of names of marks

/**
 * Draws.
 *
 * lines: [{points: [[x, y]], colour, dashed}]; bands: [{points: [[x, low, high]], colour}]; marks: [{time, label}];
 * range: [start, end] of x in seconds; zero: whether y begins at 0; label: of y; named: whether marks have their names.
 */
export function draw(canvas, { lines, bands = [], marks, range: [start, end], zero, label, named }) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return;
  const pen = prepared(canvas, width, height);
  const ink = getComputedStyle(canvas);
  const colours = { text: ink.color, grid: ink.getPropertyValue("--line") };
  const placed = named ? rows(pen, marks, (time) => LEFT + share(time) * (width - LEFT - RIGHT), width) : [];
  const top = LINE / 2 + 4 + LINE * (named ? ROWS : 0);
  const { low, high, step, ticks } = scale(lines, zero, Math.max(2, Math.floor((height - top - BOTTOM) / 30)));
  function share(time) {
    return (time - start) / (end - start);
  }
  const x = (time) => LEFT + share(time) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - ((value - low) / (high - low)) * (height - BOTTOM - top);

  pen.strokeStyle = colours.grid;
  pen.fillStyle = colours.text;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const tick of ticks) {
    stroke(pen, [[LEFT, y(tick)], [width - RIGHT, y(tick)]]);
    pen.fillText(number(tick, step), LEFT - 6, y(tick));
  }
  pen.textAlign = "center";
  const beat = timeStep(end - start, (width - LEFT - RIGHT) / 64);
  for (let tick = Math.ceil(start / beat) * beat; tick <= end; tick += beat) {
    stroke(pen, [[x(tick), height - BOTTOM], [x(tick), height - BOTTOM + 4]]);
    pen.fillText(clock(tick), x(tick), height - BOTTOM + 13);
  }
  pen.fillText("time in the talk (min:s)", (LEFT + width - RIGHT) / 2, height - 7);
  pen.save();
  pen.translate(9, (top + height - BOTTOM) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(label, 0, 0);
  pen.restore();

  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, width - LEFT - RIGHT, height);
  pen.clip();
  for (const { points, colour } of bands) {
    pen.globalAlpha = 0.16;
    pen.fillStyle = colour;
    pen.beginPath();
    for (const [time, one] of points) pen.lineTo(x(time), y(one));
    for (const [time, , other] of points.toReversed()) pen.lineTo(x(time), y(other));
    pen.fill();
    pen.globalAlpha = 1;
  }
  pen.lineWidth = 1.75;
  for (const { points, colour, dashed } of lines) {
    pen.strokeStyle = colour;
    pen.setLineDash(dashed ? [5, 4] : []);
    stroke(pen, points.map(([time, value]) => [x(time), y(value)]));
  }
  pen.restore();

  pen.strokeStyle = pen.fillStyle = colours.text;
  pen.lineWidth = 1;
  pen.setLineDash([2, 3]);
  for (const { time } of marks) {
    if (time >= start && time <= end) stroke(pen, [[x(time), top - 6], [x(time), height - BOTTOM]]);
  }
  pen.textAlign = "left";
  for (const { at, row, label } of placed) pen.fillText(label, at, LINE / 2 + row * LINE);
}

function prepared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  pen.lineJoin = "round";
  return pen;
}

function stroke(pen, points) {
  pen.beginPath();
  for (const [x, y] of points) pen.lineTo(x, y);
  pen.stroke();
}

/** Places for the names of marks in rows; one that would cover another is left out. */
function rows(pen, marks, x, width) {
  const ends = Array(ROWS).fill(0);
  const placed = [];
  for (const { time, label } of marks) {
    const size = pen.measureText(label).width;
    if (x(time) < LEFT) continue;
    const at = Math.min(x(time), width - RIGHT - size);
    const row = ends.findIndex((end) => end + 8 < at);
    if (row < 0) continue;
    ends[row] = at + size;
    placed.push({ at, row, label });
  }
  return placed;
}

/** Lowest and highest y, and the ticks between them. */
function scale(lines, zero, count) {
  const values = lines.flatMap(({ points }) => points.map(([, value]) => value)).filter(Number.isFinite);
  let low = zero ? 0 : Math.min(...values);
  let high = Math.max(...values, zero ? 1e-6 : -Infinity);
  if (!values.length) [low, high] = [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  [low, high] = [zero ? 0 : low - room, high + room];
  const step = niceStep((high - low) / count);
  const first = Math.ceil(low / step);
  const ticks = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  return { low, high, step, ticks };
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= least);
}

function timeStep(span, count) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
  return steps.find((step) => span / step <= count) ?? 7200;
}

function number(value, step) {
  const digits = [0, 1, 2, 3, 4, 5, 6].find((count) => Math.abs(step - step.toFixed(count)) < step / 1000) ?? 7;
  return value.toFixed(digits).replace("-", "−");
}

/** 75 -> "1:15". */
export function clock(seconds) {
  const whole = Math.floor(seconds + 1e-6);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
