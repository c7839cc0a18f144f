// Requests to the server, and a session over a WebSocket.

// Where the server is: the page may be served under a prefix of a proxy.
const base = () => new URL("./", window.location.href);

// The token for the server, if it needs one.
export const access = { token: "" };

// A request to the server; an answer with an error is thrown as its text.
export async function ask(path) {
  const headers = access.token ? { Authorization: `Bearer ${access.token}` } : {};
  let answer;
  try {
    answer = await fetch(new URL(path, base()), { headers });
  } catch {
    throw new Error("the server can't be reached");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let why = text;
  try {
    why = JSON.parse(text).error;
  } catch {
    why = text.slice(0, 200) || answer.statusText;
  }
  throw Object.assign(new Error(why), { status: answer.status });
}

// A live session. `on` has open({ session, frame }), answer({ frame, y, error, seconds }), closed(reason).
export class LiveSession {
  constructor(model, on) {
    this.model = model;
    this.on = on;
    this.sent = new Map(); // frame: time
    this.frame = 0;
    this.token = null;
    const url = new URL(`models/${encodeURIComponent(model.name)}/stream`, base());
    url.protocol = url.protocol.replace("http", "ws");
    if (access.token) url.searchParams.set("access_token", access.token); // a browser can't set a WebSocket's headers
    this.socket = new WebSocket(url);
    this.socket.onmessage = (event) => this.received(JSON.parse(event.data));
    this.socket.onclose = (event) => this.lost(event);
  }

  get open() {
    return this.token !== null && this.socket.readyState === WebSocket.OPEN;
  }

  get waiting() {
    return this.sent.size;
  }

  send(x) {
    if (this.socket.readyState > WebSocket.OPEN) return; // the server closes it, which `lost` will report
    this.frame += 1;
    this.sent.set(this.frame, performance.now());
    this.socket.send(JSON.stringify({ x }));
  }

  received(message) {
    if ("session" in message) {
      this.token = message.session;
      this.frame = message.frame;
      this.on.open(message);
      return;
    }
    const seconds = (performance.now() - (this.sent.get(message.frame) ?? NaN)) / 1000;
    this.sent.delete(message.frame);
    this.on.answer({ ...message, seconds });
  }

  lost({ code, reason }) {
    this.sent.clear();
    if (this.ended) return;
    const lost = code === 1006 ? "the connection to the server was lost" : `the server closed the connection with code ${code}`; // 1006: no close frame arrived
    this.on.closed(reason || (this.token === null ? "the server can't be reached, or refuses the connection" : lost));
  }

  // End the session on the server.
  close() {
    this.ended = true;
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send('{"close": true}');
    else this.socket.close();
  }
}
