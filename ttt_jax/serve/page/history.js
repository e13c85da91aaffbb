// What the TTT layers did in a talk: their last minute as measured, and all of it as means.
// Bounded, however long the talk.

export const LAST = 60; // seconds that are kept as measured
const MOST = 2400; // points of the whole talk; neighbours are joined when there are more

/** Rows of numbers over time. */
export class History {
  constructor() {
    this.recent = []; // {time: s, row: number[], count}
    this.whole = [];
    this.every = 1; // measurements that a point of `whole` is the mean of
    this.marks = []; // {time, label}
  }

  add(time, row) {
    this.recent.push({ time, row, count: 1 });
    while (this.recent[0].time < time - LAST) this.recent.shift();
    const last = this.whole.at(-1);
    if (last && last.count < this.every) this.whole[this.whole.length - 1] = join(last, { time, row, count: 1 });
    else this.whole.push({ time, row, count: 1 });
    if (this.whole.length > MOST) this.halve();
  }

  halve() {
    const { whole } = this;
    this.whole = whole.filter((_, i) => i % 2 === 0).map((point, i) => join(point, whole[2 * i + 1]));
    this.every *= 2;
  }

  /** Notes that something was done at the time of the newest measurement. */
  mark(label) {
    this.marks.push({ time: this.recent.at(-1)?.time ?? 0, label });
  }

  /** Mean row of the last `seconds`; null without any. */
  mean(seconds) {
    const end = this.recent.at(-1)?.time;
    return this.recent.filter(({ time }) => time > end - seconds).reduce((sum, point) => join(sum, point), null)?.row;
  }
}

function join(a, b) {
  if (!a || !b) return a ?? b;
  const count = a.count + b.count;
  const mean = (x, y) => (x * a.count + y * b.count) / count;
  return { time: mean(a.time, b.time), row: a.row.map((x, i) => mean(x, b.row[i])), count };
}

/** Means of the points in steps of (end - start) / steps seconds. Steps count from 0, so that means do not flicker. */
export function thinned(points, start, end, steps) {
  const width = (end - start) / steps;
  const means = [];
  let step = null;
  for (const point of points) {
    if (point.time < start) continue;
    const at = Math.floor(point.time / width);
    if (at === step) means[means.length - 1] = join(means.at(-1), point);
    else means.push(point);
    step = at;
  }
  return means;
}
