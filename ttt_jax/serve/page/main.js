// The page of a live talk: starts and ends it, and shows what it is doing.

import { Sound, secure } from "./audio.js";
import { Connection, address } from "./connection.js";
import { MemoryControls } from "./memory.js";
import { clock } from "./plot.js";
import { Plots } from "./plots.js";
import { INSECURE, MICROPHONE_LOST, aboutEnd, aboutMicrophone } from "./words.js";

const PAUSE = 3; // seconds without text after which a new paragraph begins
const LONGEST = 20; // seconds after which the next word begins a new paragraph
const PHRASE = 2; // seconds of text that a screen reader is given at once
const QUIETEST = -60; // dB of full scale at the low end of a level meter

const find = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const plots = new Plots();
const memory = new MemoryControls((command) => connection.command(command), (label) => plots.mark(label));

let connection = null;
let sound = null;
let hello = null;
let paused = false;

/** What the page has counted, for tests and for the curious. */
const counts = {
  state: "idle", // idle, opening, talking
  sent: 0, // samples of the microphone
  received: 0, // samples of Moshi
  played: 0, // samples at the loudspeaker, at the browser's rate
  loudest: 0, // RMS of the loudest 100 ms that were played
  frame: 0, // of the newest measurement
  measured: null, // layers of the newest measurement
  dropped: 0, // frames, by the server
  queue: 0, // frames that wait on the server
  buffered: 0, // seconds that wait here
  gaps: 0, // pauses in Moshi's voice because nothing had come
};
globalThis.talk = counts;

// Starting and ending

async function start() {
  Object.assign(counts, { state: "opening", sent: 0, received: 0, played: 0, loudest: 0, frame: 0, measured: null });
  Object.assign(counts, { dropped: 0, queue: 0, buffered: 0, gaps: 0 });
  warn("");
  show();
  try {
    sound = await Sound.open();
  } catch (error) {
    return stop(aboutMicrophone(error));
  }
  if (counts.state !== "opening") return sound.close(); // stopped while the browser asked
  const given = parameters();
  connection = new Connection(given, {
    hello: begin,
    audio(samples) {
      counts.received += samples.length;
      if (!paused) sound.play(samples);
    },
    text: say,
    json: read,
    refused: (message) => stop(`The server says: ${message}`),
    closed(how) {
      const refused = { ...how, duration: clock(talkTime()), address: address(given), forked: "fork" in given };
      stop();
      aboutEnd(refused).then((problem) => counts.state === "idle" && warn(problem));
    },
  });
}

function parameters() {
  const all = Object.fromEntries([...new FormData(find("settings"))].filter(([, value]) => value !== ""));
  if (asked.has("fork")) return { ...all, fork: asked.get("fork") };
  if (memory.memory !== "on") all.memory = memory.memory;
  if (memory.gate !== null) all.gate = memory.gate;
  return all;
}

function begin(said) {
  hello = said;
  say.phrase = "";
  counts.state = "talking";
  find("model").textContent = `${said.checkpoint} · ${said.codec} · ${said.sample_rate / 1000} kHz`;
  find("text").replaceChildren();
  find("spoken").replaceChildren();
  plots.begin(said.ttt_layers);
  memory.begin(said);
  sound.start({
    rate: said.sample_rate,
    frame: said.frame_size,
    onHeard({ samples, rms }) {
      level("user-level", paused ? 0 : rms);
      if (!paused && connection.hear(samples)) counts.sent += samples.length;
    },
    onPlayed(report) {
      level("moshi-level", report.rms);
      counts.loudest = Math.max(counts.loudest, report.rms);
      Object.assign(counts, { played: report.played, buffered: report.buffered, gaps: report.gaps });
      describe();
    },
    onLost: () => stop(MICROPHONE_LOST),
  });
  if (asked.has("fork")) {
    asked.delete("fork"); // it is taken up once
    history.replaceState(null, "", `?${asked}`);
  }
  find("hint").hidden = true;
  show();
}

function stop(problem = "") {
  connection?.close();
  sound?.close();
  connection = sound = null;
  counts.state = "idle";
  setPaused(false);
  setMuted(false);
  memory.end();
  level("user-level", 0);
  level("moshi-level", 0);
  warn(problem);
  show();
}

// What the server says

function read(value) {
  if (value.type !== "frame") return memory.answer(value);
  if (value.frame < counts.frame) plots.clear();
  Object.assign(counts, { frame: value.frame, measured: value.layers, queue: value.queue, dropped: value.dropped });
  plots.add(value.frame / hello.frame_rate, value.layers);
}

function say(piece) {
  const text = find("text");
  const now = performance.now() / 1000;
  const follows = text.scrollHeight - text.scrollTop - text.clientHeight < 8;
  const long = now - say.began > LONGEST && piece.startsWith(" ");
  if (!text.lastChild || now - say.last > PAUSE || long) {
    say.began = now;
    const time = document.createElement("time");
    time.textContent = clock(talkTime());
    const paragraph = document.createElement("p");
    paragraph.append(time, document.createElement("span"));
    text.append(paragraph);
  }
  say.last = now;
  text.lastChild.lastChild.append(piece);
  if (follows) text.scrollTop = text.scrollHeight;
  say.phrase += piece;
  say.timer ??= setInterval(speakPhrase, PHRASE * 1000);
}

/** Gives a screen reader the whole words that came since the last time: pieces of words would be read one by one. */
function speakPhrase() {
  const words = Math.max(0, say.phrase.trimEnd().lastIndexOf(" ")) || say.phrase.length;
  if (!words) return;
  find("spoken").append(Object.assign(document.createElement("p"), { textContent: say.phrase.slice(0, words) }));
  say.phrase = say.phrase.slice(words);
}

// What is shown

function show() {
  const idle = counts.state === "idle";
  find("start").textContent = idle ? "Start talking" : "Stop";
  find("start").classList.toggle("stop", !idle);
  for (const id of ["mute", "pause", "restart"]) find(id).disabled = counts.state !== "talking";
  describe();
}

function describe() {
  if (counts.state === "opening") return status(["Connecting … allow the microphone if the browser asks."]);
  if (counts.state === "idle") return hello && status(["Not connected", `the last talk took ${clock(talkTime())}`]);
  status([
    paused ? "Paused" : "Connected",
    clock(talkTime()),
    `playback buffer ${Math.round(counts.buffered * 1000)} ms`,
    `server queue ${plural(counts.queue, "frame")}`,
    `dropped ${plural(counts.dropped, "frame")}`,
    plural(counts.gaps, "playback gap"),
  ]);
}

function status(parts) {
  const spans = parts.map((part) => Object.assign(document.createElement("span"), { textContent: part }));
  find("status").replaceChildren(...spans);
}

/** Seconds that were measured of the talk. */
function talkTime() {
  return hello ? counts.frame / hello.frame_rate : 0;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function warn(problem) {
  find("alert").textContent = problem;
  find("alert").hidden = !problem;
}

function level(id, rms) {
  const share = rms > 0 ? 1 - (20 * Math.log10(rms)) / QUIETEST : 0;
  find(id).firstElementChild.style.transform = `scaleX(${Math.max(0, Math.min(1, share))})`;
}

// Buttons

function setPaused(value) {
  paused = value;
  find("pause").setAttribute("aria-pressed", value);
  find("pause").textContent = value ? "Go on" : "Pause";
}

function setMuted(value) {
  find("mute").setAttribute("aria-pressed", value);
  find("mute").textContent = value ? "Unmute" : "Mute";
  sound?.mute(value);
}

find("start").onclick = () => (counts.state === "idle" ? start() : stop());
find("mute").onclick = () => setMuted(find("mute").getAttribute("aria-pressed") !== "true");
find("pause").onclick = () => {
  setPaused(!paused);
  connection.control(paused ? "pause" : "start");
  if (paused) sound.clear();
};
find("restart").onclick = () => {
  connection.control("restart");
  setPaused(false);
  sound.clear();
  find("text").replaceChildren();
  plots.clear();
  counts.frame = 0;
};
document.addEventListener("visibilitychange", () => sound?.resume());
document.querySelector("[name=token]").value = asked.get("token") ?? "";

if (!secure()) {
  find("start").disabled = true;
  warn(INSECURE);
} else if (asked.has("fork")) {
  find("hint").textContent = "This is the fork of a talk. Press Start: it goes on from where it was forked.";
  find("hint").hidden = false;
}
