// The controls of a talk's memory. Each sends a command; what the server answers is what is shown.

const NOTES = {
  on: "On: the fast weights learn from every frame.",
  frozen: "Frozen: the fast weights are used as they stand, and learn nothing.",
  off: "Off: the TTT layers add nothing to what Moshi computes; the fast weights learn on.",
};

const find = (id) => document.getElementById(id);
const radio = (value) => document.querySelector(`[name=memory][value=${value}]`);

export class MemoryControls {
  /** send(command): to the server, where a talk runs; marked(label): something has taken effect. */
  constructor(send, marked) {
    this.send = send;
    this.marked = marked;
    this.running = false;
    for (const choice of document.querySelectorAll("[name=memory]")) {
      choice.onchange = () => this.ask({ command: "memory", value: choice.value });
    }
    find("gate").oninput = () => this.describe();
    find("gate").onchange = find("gate-trained").onchange = () => this.ask({ command: "gate", value: this.gate });
    find("forget").onclick = () => this.ask({ command: "reset" });
    find("fork").onclick = () => this.ask({ command: "fork" });
    find("save").onsubmit = (event) => this.askNamed(event, "save", find("save-name").value.trim());
    find("load").onsubmit = (event) => this.askNamed(event, "load", find("load-name").value);
    this.list([]);
    this.set({ memory: "on", gate: null });
  }

  get memory() {
    return document.querySelector("[name=memory]:checked").value;
  }

  /** -1 to 1, or null as trained. */
  get gate() {
    return find("gate-trained").checked ? null : Number(find("gate").value);
  }

  askNamed(event, command, name) {
    event.preventDefault();
    this.ask({ command, name });
  }

  ask(command) {
    this.describe();
    find("answer").textContent = "";
    if (this.running) this.send(command);
  }

  /** Shows a talk as the server describes it: {memory, gate, memories, ttt_layers}. */
  begin(hello) {
    const has = hello.ttt_layers.length > 0;
    find("without").hidden = has;
    find("controls").hidden = find("plots").hidden = !has;
    this.set(hello);
    this.list(hello.memories);
    this.enable(true);
  }

  end() {
    this.enable(false);
  }

  set({ memory, gate }) {
    this.confirmed = { memory, gate };
    radio(memory).checked = true;
    find("gate-trained").checked = gate === null;
    if (gate !== null) find("gate").value = gate;
    this.describe();
  }

  describe() {
    find("memory-note").textContent = NOTES[this.memory];
    find("gate").disabled = this.gate === null;
    find("gate-value").textContent = this.gate === null ? "" : this.gate.toFixed(2).replace("-", "−");
  }

  list(names) {
    this.names = names;
    const options = names.map((name) => new Option(name));
    const chosen = find("load-name").value;
    find("load-name").replaceChildren(...(names.length ? options : [new Option("none is saved", "")]));
    if (names.includes(chosen)) find("load-name").value = chosen;
    this.enable(this.running);
  }

  enable(running) {
    this.running = running;
    for (const control of [find("forget"), find("fork"), ...find("save").elements]) control.disabled = !running;
    for (const control of find("load").elements) control.disabled = !running || !this.names.length;
  }

  /** Takes the server's "done" or "error". */
  answer(answer) {
    if (answer.memories) this.list(answer.memories);
    if (answer.type === "error") {
      find("answer").textContent = `The server says: ${answer.message}`;
      this.set(this.confirmed);
      return;
    }
    find("answer").replaceChildren(...this.effect(answer));
  }

  /** Notes what a command did and returns the words and links that say so. */
  effect({ command, value, name, key }) {
    if (command === "memory") {
      this.confirmed.memory = value;
      this.marked({ on: "memory on", frozen: "frozen", off: "memory off" }[value]);
    } else if (command === "gate") {
      this.confirmed.gate = value;
      this.marked(value === null ? "gate as trained" : `gate ${value}`);
    } else if (command === "reset") {
      this.marked("forget");
      return ["The fast weights are W₀ again."];
    } else if (command === "save") {
      this.marked(`save ${name}`);
      find("load-name").value = name;
      find("save-name").value = "";
      return [`Saved as ${name}.`];
    } else if (command === "load") {
      this.marked(`take up ${name}`);
      return [`Took up ${name}.`];
    } else if (command === "fork") {
      return this.open(key);
    }
    return [];
  }

  open(key) {
    const link = document.createElement("a");
    const token = document.querySelector("[name=token]").value;
    const url = new URL(document.baseURI);
    url.searchParams.set("fork", key);
    if (token) url.searchParams.set("token", token);
    link.href = url;
    link.target = "_blank";
    link.textContent = "Open the fork";
    if (window.open(url)) return ["The fork waits in a new tab for a minute: press Start there."];
    return [link, " within a minute."];
  }
}
