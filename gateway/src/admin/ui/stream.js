// Reads the server-sent events of the gateway. `EventSource` cannot send the token, so the stream is
// read with `fetch`.

/// A stream without an event for this time has failed. The gateway sends one each second.
const SILENCE = 6000;

const tokenHeaders = () => {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
};

/// A request to the admin API. The result has the status, and the body as JSON or as a text.
export async function request(method, path) {
  const response = await fetch(path, { method, headers: tokenHeaders(), signal: AbortSignal.timeout(20000) });
  const text = await response.text();
  let json = null;
  try {
    json = JSON.parse(text);
  } catch {
    // A refusal is a line of text.
  }
  return { ok: response.ok, status: response.status, json, text: text.trim() };
}

/// Calls `on.event(name, data)` for each event, `on.refused(status)` where the stream is not opened,
/// and `on.lost()` where it ends. Resolves at its end.
export async function follow(on, signal) {
  const controller = new AbortController();
  const abort = () => controller.abort();
  signal.addEventListener("abort", abort);
  let timer = setTimeout(abort, SILENCE);
  try {
    const response = await fetch("/api/v1/stream", { headers: tokenHeaders(), signal: controller.signal });
    if (!response.ok) return on.refused(response.status, (await response.text()).trim());
    let rest = "";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      clearTimeout(timer);
      timer = setTimeout(abort, SILENCE);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      events.forEach(event => dispatch(event, on));
    }
    on.lost();
  } catch {
    on.lost();
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", abort);
  }
}

function dispatch(text, on) {
  const field = name => text.split("\n").find(line => line.startsWith(`${name}: `))?.slice(name.length + 2);
  const data = field("data");
  if (data) on.event(field("event"), JSON.parse(data));
}
