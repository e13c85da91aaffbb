// The websocket to the server: Kyutai's protocol, with samples as int16 and commands as JSON.

const KIND = { handshake: 0, audio: 1, text: 2, control: 3, metadata: 4, error: 5, ping: 6 };
const CONTROL = { start: 0, pause: 2, restart: 3 };
const PATIENCE = 10000; // milliseconds; the server sends something every 5 s, a ping if nothing else
const KEEP_ALIVE = 20000; // milliseconds between pings; the server closes talks that send nothing for a minute
const MOST_WAITING = 1 << 16; // bytes that may wait to be sent; more audio is dropped: late speech helps nobody

/** The address of a talk, with http. */
export function address(parameters) {
  const url = new URL("api/chat", document.baseURI);
  url.search = new URLSearchParams({ audio: "pcm", metadata: "1", ...parameters });
  return url;
}

/** One talk. */
export class Connection {
  /**
   * parameters: of the URL, by name.
   * on: functions hello(json), audio(Int16Array), text(string), json(value), refused(string: what the server said) and
   * closed({answered, code, reason}); closed is called once, not after close().
   */
  constructor(parameters, on) {
    this.on = on;
    this.answered = false; // whether the server has said hello
    this.dropped = 0; // blocks of the microphone that were not sent
    const url = address(parameters);
    url.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(data);
    this.socket.onclose = ({ code, reason }) => this.end(code, reason);
    this.pings = setInterval(() => this.send(KIND.ping, new Uint8Array(0)), KEEP_ALIVE);
    this.watch();
  }

  watch() {
    clearTimeout(this.watchdog);
    this.watchdog = setTimeout(() => this.end(0, ""), PATIENCE);
  }

  receive(data) {
    this.watch();
    if (!(data instanceof ArrayBuffer) || data.byteLength === 0) return;
    const kind = new Uint8Array(data)[0];
    const content = data.slice(1);
    if (kind === KIND.audio) this.on.audio(new Int16Array(content, 0, content.byteLength >> 1));
    if (kind === KIND.text) this.on.text(new TextDecoder().decode(content));
    if (kind === KIND.error) this.on.refused(new TextDecoder().decode(content));
    if (kind === KIND.metadata) this.read(JSON.parse(new TextDecoder().decode(content)));
  }

  read(value) {
    if (value.type !== "hello") return this.on.json(value);
    this.answered = true;
    this.on.hello(value);
  }

  end(code, reason) {
    if (this.ended) return;
    this.close();
    this.on.closed({ answered: this.answered, code, reason });
  }

  /** Ends the talk. */
  close() {
    this.ended = true;
    clearTimeout(this.watchdog);
    clearInterval(this.pings);
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
  }

  /** Sends samples, an Int16Array; returns whether the network took them. */
  hear(samples) {
    if (this.socket.bufferedAmount > MOST_WAITING) {
      this.dropped += 1;
      return false;
    }
    return this.send(KIND.audio, new Uint8Array(samples.buffer));
  }

  /** Sends {command, ...}. */
  command(value) {
    return this.send(KIND.metadata, new TextEncoder().encode(JSON.stringify(value)));
  }

  /** Sends "start", "pause" or "restart". */
  control(name) {
    return this.send(KIND.control, Uint8Array.of(CONTROL[name]));
  }

  send(kind, content) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    const message = new Uint8Array(content.length + 1);
    message[0] = kind;
    message.set(content, 1);
    this.socket.send(message);
    return true;
  }
}
