// The page of a live talk: starts and ends it, and shows what it is doing.

import { Sound, secure } from "./audio.js";
import { Connection, address } from "./connection.js";
import { MemoryControls } from "./memory.js";
import { clock } from "./plot.js";
import { Plots } from "./plots.js";
import { Transcript } from "./text.js";
import { FORK_GONE, INSECURE, MICROPHONE_LOST, aboutEnd, aboutMicrophone } from "./words.js";

const QUIETEST = -60; // dB of full scale at the low end of a level meter

const find = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const plots = new Plots();
const transcript = new Transcript(find("text"), find("spoken"));
const memory = new MemoryControls((command) => connection.command(command), (label) => plots.mark(label));

let connection = null;
let sound = null;
let hello = null;
let awake = null; // a WakeLockSentinel
let paused = false;
let attempt = 0; // counts starts and stops

/** What the page counts in a talk; it is there as `talk`, for tests and for the curious. */
const fresh = () => ({
  state: "idle", // idle, opening, talking
  sent: 0, // samples of the microphone
  received: 0, // samples of Moshi
  played: 0, // samples at the loudspeaker, at the browser's rate
  loudest: 0, // RMS of the loudest 100 ms that were played
  frame: 0, // of the newest measurement
  measured: null, // layers of the newest measurement
  dropped: 0, // frames, by the server
  droppedBefore: 0, // of them before the last restart
  queue: 0, // frames that wait on the server
  buffered: 0, // seconds that wait here
  gaps: 0, // stops and jumps in Moshi's voice because frames came late
});
const counts = fresh();
globalThis.talk = counts;

// Starting and ending

async function start() {
  if (!find("settings").checkValidity()) {
    document.querySelector("details").open = true;
    return find("settings").reportValidity();
  }
  const mine = ++attempt;
  Object.assign(counts, fresh(), { state: "opening" });
  warn("");
  show();
  const opened = await Sound.open().catch((error) => mine === attempt && stop(aboutMicrophone(error)));
  if (!opened) return;
  if (mine !== attempt) return opened.close(); // stopped while the browser asked
  sound = opened;
  const given = parameters();
  connection = new Connection(given, {
    hello: begin,
    audio(samples) {
      counts.received += samples.length;
      if (!paused) sound.play(samples);
    },
    text: (piece) => transcript.add(piece, talkTime()),
    json: read,
    refused: (message) => stop(`The server says: ${message}`),
    closed(how) {
      const refused = { ...how, duration: clock(talkTime()), address: address(given), forked: "fork" in given };
      stop();
      explain(refused);
    },
  });
}

async function explain(refused) {
  const problem = await aboutEnd(refused);
  if (problem === FORK_GONE) leaveFork();
  if (counts.state === "idle") warn(problem);
}

/** The next talk is no fork. */
function leaveFork() {
  find("hint").hidden = true;
  if (!asked.has("fork")) return;
  asked.delete("fork");
  history.replaceState(null, "", `?${asked}`);
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
  counts.state = "talking";
  find("model").textContent = `${said.checkpoint} · ${said.codec} · ${said.sample_rate / 1000} kHz`;
  transcript.clear();
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
  leaveFork();
  keepAwake();
  show();
}

function stop(problem = "") {
  attempt += 1;
  connection?.close();
  sound?.close();
  awake?.release();
  connection = sound = awake = null;
  counts.state = "idle";
  setPaused(false);
  setMuted(false);
  memory.end();
  level("user-level", 0);
  level("moshi-level", 0);
  warn(problem);
  show();
}

/** Keeps a phone's screen on during a talk: with the screen the microphone goes off. */
async function keepAwake() {
  if (counts.state !== "talking" || document.hidden) return;
  awake = await navigator.wakeLock?.request("screen").catch(() => null);
}

// What the server says

function read(value) {
  if (value.type !== "frame") return memory.answer(value);
  if (value.frame < counts.frame) plots.clear();
  Object.assign(counts, { frame: value.frame, measured: value.layers, queue: value.queue, dropped: value.dropped });
  plots.add(value.frame / hello.frame_rate, value.layers);
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
  if (counts.state === "opening") return status([["Connecting … allow the microphone if the browser asks."]]);
  if (counts.state === "idle") {
    const last = counts.frame ? [[`the last talk took ${clock(talkTime())}`]] : [];
    return status([["Not connected"], ...last]);
  }
  status([
    [`${paused ? "Paused" : "Connected"} ${clock(talkTime())}`, "Time that the talk has taken"],
    [`delay ${Math.round(delay() * 1000)} ms`, "From the microphone to the loudspeaker: network, server, buffer"],
    [`queue ${plural(counts.queue, "frame")}`, "Frames that wait on the server"],
    [`dropped ${plural(counts.dropped, "frame")}`, "Frames that came faster than the server could hear them"],
    [plural(counts.gaps, "gap"), "How often Moshi's voice stopped or jumped because frames came late"],
  ]);
}

/** Seconds. Each frame that was heard is answered by one that is spoken. */
function delay() {
  const unanswered = counts.sent - counts.received - (counts.dropped - counts.droppedBefore) * hello.frame_size;
  return Math.max(0, unanswered) / hello.sample_rate + counts.buffered + sound.latency;
}

/** Shows parts, [words, explanation] each. */
function status(parts) {
  const span = ([textContent, title = ""]) => Object.assign(document.createElement("span"), { textContent, title });
  find("status").replaceChildren(...parts.map(span));
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
  if (problem) find("alert").scrollIntoView({ block: "nearest" });
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
  transcript.clear();
  plots.clear();
  Object.assign(counts, { sent: 0, received: 0, frame: 0, droppedBefore: counts.dropped });
};
document.addEventListener("visibilitychange", () => {
  sound?.resume();
  keepAwake();
});
document.querySelector("[name=token]").value = asked.get("token") ?? "";

if (!secure()) {
  find("start").disabled = true;
  warn(INSECURE);
} else if (asked.has("fork")) {
  find("hint").textContent = "This is the fork of a talk. Press Start: it goes on from where it was forked.";
  find("hint").hidden = false;
}
