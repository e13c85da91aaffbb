// What Moshi says, in paragraphs with times, and in phrases for a screen reader.

import { clock } from "./plot.js";

const PAUSE = 3; // seconds without text after which a new paragraph begins
const LONGEST = 20; // seconds after which the next word begins a new paragraph
const PHRASE = 2; // seconds of text that a screen reader is given at once
const KEPT = 20; // phrases

export class Transcript {
  /** shown: the element for the text; spoken: the live region. */
  constructor(shown, spoken) {
    this.shown = shown;
    this.spoken = spoken;
    this.clear();
    new ResizeObserver(() => this.follows && this.toEnd()).observe(shown); // a phone that is turned
    shown.addEventListener("scroll", () => (this.follows = this.atEnd()));
    setInterval(() => this.speak(), PHRASE * 1000);
  }

  clear() {
    this.shown.replaceChildren();
    this.spoken.replaceChildren();
    this.phrase = "";
    this.follows = true;
    this.began = this.last = 0; // seconds: of the paragraph, of the last piece
  }

  /** Adds a piece, which may be less than a word; time: of the talk, in seconds. */
  add(piece, time) {
    const { shown } = this;
    const now = performance.now() / 1000;
    this.follows = this.atEnd();
    const long = now - this.began > LONGEST && piece.startsWith(" ");
    if (!shown.lastChild || now - this.last > PAUSE || long) this.paragraph(now, time);
    this.last = now;
    this.shown.lastChild.lastChild.append(piece);
    if (this.follows) this.toEnd();
    this.phrase += piece;
  }

  atEnd() {
    return this.shown.scrollHeight - this.shown.scrollTop - this.shown.clientHeight < 8;
  }

  toEnd() {
    this.shown.scrollTop = this.shown.scrollHeight;
  }

  paragraph(now, time) {
    const paragraph = document.createElement("p");
    const stamp = Object.assign(document.createElement("time"), { textContent: clock(time) });
    paragraph.append(stamp, document.createElement("span"));
    this.shown.append(paragraph);
    this.began = now;
  }

  /** Gives the live region the whole words that came since the last time: pieces of words would be read one by one. */
  speak() {
    const words = Math.max(0, this.phrase.trimEnd().lastIndexOf(" ")) || this.phrase.length;
    if (!words) return;
    this.spoken.append(Object.assign(document.createElement("p"), { textContent: this.phrase.slice(0, words) }));
    if (this.spoken.children.length > KEPT) this.spoken.firstChild.remove();
    this.phrase = this.phrase.slice(words);
  }
}
