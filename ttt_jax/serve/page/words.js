// What went wrong, in words that say what to do.

export const INSECURE =
  "The browser gives the microphone only to pages that came over https or from this machine (localhost). " +
  "Start the server with a certificate, or reach it through a tunnel to localhost.";

const NO_ANSWER = "The server does not answer. Check that it runs, then press Start.";

/** Of a microphone that could not be opened. */
export function aboutMicrophone(error) {
  const words = {
    NetworkError: NO_ANSWER,
    NotAllowedError: "The browser may not use the microphone. Allow it beside this page's address, then press Start.",
    NotFoundError: "No microphone was found. Connect one, then press Start.",
    NotReadableError: "The microphone did not open: another program may be using it. Close that, then press Start.",
  };
  return words[error.name] ?? `The microphone did not open (${error.message}). Reload the page and try again.`;
}

export const FORK_GONE =
  "The fork is gone: it can be taken up once, within a minute. Press Start for a new talk.";

export const MICROPHONE_LOST = "The microphone is gone. Connect it again, then press Start.";

/**
 * Of a connection that ended: {answered, code, reason} as of Connection; duration and address of the talk; whether it
 * was a fork.
 * A websocket does not say why it was refused, so the server is asked again, without one.
 */
export async function aboutEnd({ answered, code, reason, duration, address, forked }) {
  if (reason) return `The server says: ${reason}`;
  if (answered && code === 1000) return "The server ended the talk. Press Start for a new one.";
  if (answered) return `The connection was lost after ${duration}. Press Start for a new talk.`;
  let response, rows;
  try {
    response = await fetch(address);
    rows = await readMetrics(address.searchParams.get("token"));
  } catch {
    return NO_ANSWER;
  }
  if (response.status === 401) return "The server asks for a token. Enter it under Settings, then press Start.";
  if (forked) return FORK_GONE;
  const { ttt_jax_talks: taken, ttt_jax_rows: all } = rows;
  if (taken >= all) return `All ${all} talks are taken. Wait until one ends, then press Start.`;
  if (response.status === 400) return `The server says: ${await response.text()}`;
  return "The server refused the talk. Press Start to try again.";
}

/** The numbers of the server's metrics, by name. */
async function readMetrics(token) {
  const url = new URL("metrics", document.baseURI);
  if (token) url.searchParams.set("token", token);
  const text = await (await fetch(url)).text();
  return Object.fromEntries([...text.matchAll(/^(\w+) (\d+)$/gm)].map(([, name, value]) => [name, Number(value)]));
}
