// What went wrong, in words that say what to do.

export const INSECURE =
  "The browser gives the microphone only to pages that came over https or from this machine (localhost). " +
  "Start the server with a certificate, or reach it through a tunnel to localhost.";

/** Of a microphone that could not be opened. */
export function aboutMicrophone(error) {
  const words = {
    NotAllowedError: "The browser may not use the microphone. Allow it beside the address of this page, then press Start.",
    NotFoundError: "No microphone was found. Connect one, then press Start.",
    NotReadableError: "The microphone did not open: another program may be using it. Close that program, then press Start.",
  };
  return words[error.name] ?? `The microphone did not open (${error.message}). Reload the page and try again.`;
}

export const MICROPHONE_LOST = "The microphone is gone. Connect it again, then press Start.";

/** Of a connection that ended. The websocket does not say why it was refused, so the server's health is asked. */
export async function aboutEnd({ answered, code, reason }, duration) {
  if (reason) return `The server ended the talk: ${reason}`;
  if (answered && code === 1000) return "The server ended the talk. Press Start for a new one.";
  if (answered) return `The connection was lost after ${duration}. Press Start for a new talk.`;
  const health = await readHealth();
  if (!health) return "The server does not answer. Check that it runs, then press Start.";
  if (health.free === 0) return "All talks are taken. Wait until one ends, then press Start.";
  return "The server refused the talk. If it asks for a token, enter it under Settings, then press Start.";
}

async function readHealth() {
  try {
    return await (await fetch(new URL("healthz", document.baseURI))).json();
  } catch {
    return null;
  }
}
