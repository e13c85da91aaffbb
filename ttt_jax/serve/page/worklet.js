// The two audio processors: the microphone at the server's rate, and Moshi's voice with a jitter buffer.
// One file without imports, because not every browser lets a worklet import.

const ZEROS = 24; // zero crossings of the sinc on each side
const CUTOFF = 0.92; // of the lower rate's half
const REPORT = 0.1; // seconds between two reports of the player
const SETTLE = 5; // seconds after which the player takes what was always left over for needless delay
const QUIET = 0.01; // samples below may be left out unheard

/** Changes the sample rate of a stream: a Blackman-windowed sinc, by phases; ZEROS periods of the lower rate late. */
class Resampler {
  constructor(from, to) {
    const divisor = greatestDivisor(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    const band = CUTOFF * Math.min(1, to / from);
    this.half = Math.ceil((ZEROS * CUTOFF) / band);
    this.filters = Array.from({ length: this.up }, (_, phase) => lowPass(band, this.half, phase / this.up));
    this.held = new Float32Array(2 * this.half - 1);
    this.position = (this.half - 1) * this.up; // of the next output in `held`, in input samples times `up`
  }

  /** Takes samples and returns those of the other rate that are ready. */
  push(samples) {
    if (this.up === this.down) return samples;
    const input = new Float32Array(this.held.length + samples.length);
    input.set(this.held);
    input.set(samples, this.held.length);
    const output = [];
    for (; Math.floor(this.position / this.up) + this.half < input.length; this.position += this.down) {
      const filter = this.filters[this.position % this.up];
      const first = Math.floor(this.position / this.up) - this.half + 1;
      let sum = 0;
      for (let tap = 0; tap < filter.length; tap++) sum += filter[tap] * input[first + tap];
      output.push(sum);
    }
    const past = Math.min(Math.floor(this.position / this.up) - this.half + 1, input.length);
    this.held = input.slice(past);
    this.position -= past * this.up;
    return Float32Array.from(output);
  }
}

function greatestDivisor(a, b) {
  return b ? greatestDivisor(b, a % b) : a;
}

/** The 2 * half taps of a low-pass, `shift` (0 to 1) after the middle; `band` is a share of the input's half rate. */
function lowPass(band, half, shift) {
  const taps = Float32Array.from({ length: 2 * half }, (_, tap) => {
    const x = tap - half + 1 - shift;
    const sinc = x === 0 ? 1 : Math.sin(Math.PI * band * x) / (Math.PI * band * x);
    const turn = (Math.PI * x) / half;
    return Math.abs(x) > half ? 0 : sinc * (0.42 + 0.5 * Math.cos(turn) + 0.08 * Math.cos(2 * turn));
  });
  const sum = taps.reduce((total, tap) => total + tap, 0);
  return taps.map((tap) => tap / sum);
}

/** Posts {samples: Int16Array, rms} every 20 ms. Takes {muted}: silence is sent then. Options: rate. */
class Capture extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.resampler = new Resampler(sampleRate, rate);
    this.block = new Int16Array(Math.round(rate / 50));
    this.filled = 0;
    this.power = 0;
    this.muted = false;
    this.port.onmessage = ({ data }) => (this.muted = data.muted);
  }

  process([input]) {
    if (!input.length) return true;
    for (const sample of this.resampler.push(input[0])) {
      const heard = this.muted ? 0 : Math.max(-1, Math.min(1, sample));
      this.block[this.filled++] = Math.round(heard * 32767);
      this.power += heard * heard;
      if (this.filled === this.block.length) this.post();
    }
    return true;
  }

  post() {
    const samples = this.block.slice();
    this.port.postMessage({ samples, rms: Math.sqrt(this.power / samples.length) }, [samples.buffer]);
    this.filled = this.power = 0;
  }
}

/**
 * Plays Int16Array messages; the message "clear" empties the buffer, as at a pause. Options: rate, wait, most.
 *
 * Playing begins when `wait` seconds lie ready. A longer queue than `most` seconds is cut to `wait`; what a burst has
 * left in a shorter one goes in the next silence. Posts {rms, buffered (s), played, skipped (samples), gaps: how often
 * it stopped or skipped}.
 */
class Playback extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate, wait, most } }) {
    super();
    this.rate = rate;
    this.wait = Math.round(wait * sampleRate);
    this.most = most * sampleRate;
    this.clear();
    this.played = this.skipped = this.gaps = this.power = this.since = 0;
    this.port.onmessage = ({ data }) => (data === "clear" ? this.clear() : this.take(data));
  }

  clear() {
    this.resampler = new Resampler(this.rate, sampleRate);
    this.queue = [];
    this.offset = 0; // samples of the first block that were played
    this.buffered = 0;
    this.playing = false;
    this.settle();
  }

  settle() {
    this.spare = Number.isFinite(this.least) ? Math.max(0, Math.floor(this.least - this.wait / 2)) : 0;
    this.least = Infinity; // samples that were left over after a block
    this.settled = 0;
  }

  take(samples) {
    const block = this.resampler.push(Float32Array.from(samples, (sample) => sample / 32768));
    this.queue.push(block);
    this.buffered += block.length;
    if (this.buffered > this.most) {
      this.skipped += this.drop(this.buffered - this.wait);
      this.gaps += 1;
    }
    if (this.buffered >= this.wait) this.playing = true;
  }

  /** Leaves out at most `count` samples; returns how many. */
  drop(count) {
    let left = count;
    while (left > 0 && this.queue.length) {
      const step = Math.min(left, this.queue[0].length - this.offset);
      this.advance(step);
      left -= step;
    }
    return count - left;
  }

  advance(count) {
    this.offset += count;
    this.buffered -= count;
    if (this.offset >= this.queue[0].length) {
      this.queue.shift();
      this.offset = 0;
    }
  }

  process(_, [[output]]) {
    let index = 0;
    let peak = 0;
    while (this.playing && index < output.length) {
      if (!this.queue.length) {
        this.playing = false;
        this.least = 0;
        this.gaps += 1;
        break;
      }
      const sample = (output[index++] = this.queue[0][this.offset]);
      this.power += sample * sample;
      peak = Math.max(peak, Math.abs(sample));
      this.advance(1);
    }
    if (this.playing) this.hurry(peak, output.length);
    this.played += index;
    this.since += output.length;
    if (this.since >= REPORT * sampleRate) this.report();
    return true;
  }

  hurry(peak, length) {
    if (peak < QUIET) this.spare -= this.drop(Math.min(this.spare, length));
    this.least = Math.min(this.least, this.buffered);
    this.settled += length;
    if (this.settled >= SETTLE * sampleRate) this.settle();
  }

  report() {
    const { played, skipped, gaps } = this;
    const rms = Math.sqrt(this.power / this.since);
    this.port.postMessage({ rms, played, skipped, gaps, buffered: this.buffered / sampleRate });
    this.power = this.since = 0;
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
