// The microphone and the loudspeaker of the browser, at the server's sample rate.

const WAIT = 2; // frames that lie ready before playing begins
const MOST = 5; // frames; a longer queue is cut

/** Whether this page may use a microphone at all. */
export function secure() {
  return window.isSecureContext && Boolean(navigator.mediaDevices) && "AudioWorkletNode" in window;
}

/** An open microphone and loudspeaker. */
export class Sound {
  /** Asks for the microphone; call it from a click. Throws a DOMException; NetworkError: the server is gone. */
  static async open() {
    const context = new AudioContext({ latencyHint: "interactive" });
    let stream = null;
    try {
      await context.resume();
      await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url)).catch(() => {
        throw new DOMException("the server does not send worklet.js", "NetworkError");
      });
      const wanted = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
      return new Sound(context, stream);
    } catch (error) {
      stopTracks(stream);
      context.close();
      throw error;
    }
  }

  constructor(context, stream) {
    this.context = context;
    this.stream = stream;
  }

  /**
   * Begins to listen and to play.
   *
   * rate: of the server, Hz; frame: its samples. onHeard({samples, rms}): the microphone, every 20 ms.
   * onPlayed({rms, buffered, played, skipped, gaps}): the loudspeaker, every 100 ms. onLost(): the microphone is gone.
   */
  start({ rate, frame, onHeard, onPlayed, onLost }) {
    const { context } = this;
    this.capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0, processorOptions: { rate } });
    const playback = { rate, wait: (WAIT * frame) / rate, most: (MOST * frame) / rate };
    this.playback = new AudioWorkletNode(context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: playback,
    });
    this.capture.port.onmessage = ({ data }) => onHeard(data);
    this.playback.port.onmessage = ({ data }) => onPlayed(data);
    this.stream.getAudioTracks()[0].onended = onLost;
    context.createMediaStreamSource(this.stream).connect(this.capture);
    this.playback.connect(context.destination);
  }

  /** Plays samples, an Int16Array. */
  play(samples) {
    this.playback.port.postMessage(samples, [samples.buffer]);
  }

  /** Forgets what was not yet played. */
  clear() {
    this.playback.port.postMessage("clear");
  }

  /** Seconds from the player to the ear, as far as the browser knows. */
  get latency() {
    return this.context.outputLatency || this.context.baseLatency || 0;
  }

  /** While true the server hears silence. */
  mute(muted) {
    this.capture.port.postMessage({ muted });
  }

  /** Goes on after the browser stopped the sound, as phones do in the background. */
  resume() {
    if (this.context.state !== "closed") this.context.resume();
  }

  /** Gives the microphone back. */
  close() {
    stopTracks(this.stream);
    for (const node of [this.capture, this.playback]) if (node) node.port.onmessage = null;
    if (this.context.state !== "closed") this.context.close();
  }
}

function stopTracks(stream) {
  for (const track of stream?.getTracks() ?? []) {
    track.onended = null;
    track.stop();
  }
}
