// The browser's side of the chat. The protocol stands at the top of node.py.
//
// What others wrote goes into the page as text (`textContent`), never as HTML. Everything is bounded:
// lines of a room, names in the list, what waits for an answer. When the connection is cut, the page
// tries this node and then the others, and says in each room that messages may have been missed.
"use strict";

const ROOMS = ["general", "tea", "random"];
const MAX_LINES = 400, MAX_PEOPLE = 200;
const TYPING_EVERY = 2000, TYPING_LASTS = 4000; // ms
const PING_EVERY = 4000, ANSWER_WITHIN = 8000, WELCOME_WITHIN = 5000; // ms
const NODE_HUES = [265, 160, 215, 320, 110, 190]; // no red: nothing is wrong with a node
const BACKOFF = 250, MAX_BACKOFF = 5000; // ms

const $ = (id) => document.getElementById(id);
const rooms = new Map(); // name -> {box, tab, unread}
const online = new Map(); // user -> node
const typists = new Map(); // "room\nuser" -> {room, user, until}
const waiting = new Map(); // ack -> what to do with the answer
let me = "", node = "", current = "", count = 0, away = false, acks = 0;
let nodes = [location.origin], at = 0, tries = 0;
let socket = null, live = false, heard = 0, asked = 0, cutSince = null, saidTyping = 0, again = 0;

// -- The connection ----------------------------------------------------------------------------

function connect() {
  clearTimeout(again);
  socket?.close();
  const url = new URL("/ws", nodes[at % nodes.length]);
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("user", me);
  const mine = (socket = new WebSocket(url));
  [heard, asked] = [0, Date.now()];
  mine.onmessage = ({ data }) => {
    if (mine !== socket) return;
    heard = Date.now();
    const message = JSON.parse(data);
    if ("event" in message) hear[message.event]?.(message.data);
    else settle(message.ack, message.data);
  };
  mine.onclose = ({ code, reason }) => mine === socket && cut(code, reason);
}

function cut(code, reason) {
  socket = null;
  if (code === 1008) return;
  if (live) {
    cutSince = new Date(heard);
    tries = 0;
    for (const ack of [...waiting.keys()]) settle(ack, null);
  }
  live = false;
  typists.clear();
  if (code === 1009) note("The node hung up: that was too long.", "bad");
  if (code === 1013) note(`The node hung up: ${reason || "it is busy"}.`, "bad");
  if (tries++) at += 1; // this node once more, then the others in turn
  const most = Math.min(BACKOFF * 2 ** tries, MAX_BACKOFF);
  again = setTimeout(connect, BACKOFF + Math.random() * (most - BACKOFF));
  showState();
}

function send(event, data, answered) {
  if (socket?.readyState !== WebSocket.OPEN) return false;
  const message = { event, data };
  if (answered) waiting.set((message.ack = ++acks), answered);
  socket.send(JSON.stringify(message));
  return true;
}

// What a message of ours came to; null: the connection was cut before the answer.
function settle(ack, data, error) {
  const answered = waiting.get(ack);
  waiting.delete(ack);
  answered?.(data, error);
}

setInterval(() => {
  for (const [key, { until }] of typists) if (until < Date.now()) typists.delete(key);
  showTyping();
  // A connection that is only half there tells nobody: no answer is the sign.
  const silent = heard < asked && Date.now() - asked;
  if (socket && silent > (live ? ANSWER_WITHIN : WELCOME_WITHIN)) {
    const dead = socket;
    cut();
    dead.close();
  }
}, 500);
setInterval(() => {
  if (!live) return;
  if (heard >= asked) asked = Date.now(); // browsers slow down the clocks of pages that nobody sees
  send("ping", null, () => {});
}, PING_EVERY);

// -- What the node says ------------------------------------------------------------------------

const hear = {
  welcome(data) {
    ({ node, away, count } = data);
    me = data.user;
    live = true;
    tries = 0;
    if (data.nodes.length) {
      nodes = data.nodes;
      at = Math.max(0, nodes.findIndex((url) => new URL(url).host === new URL(socket.url).host));
    }
    online.clear();
    for (const [user, place] of Object.entries(data.online)) online.set(user, place);
    typists.clear();
    $("welcome").hidden = true;
    $("chat").hidden = false;
    for (const room of rooms.size ? rooms.keys() : ROOMS) join(room);
    show(current || ROOMS[0]);
    if (cutSince) {
      const text = `Your connection was cut at ${clock(cutSince)}. You are on ${node} now. ` +
        "Messages may have been missed.";
      for (const room of rooms.keys()) line(room, text, "gap");
      cutSince = null;
    }
    showState();
    showPeople();
    $("text").focus();
  },
  message(data) {
    typists.delete(`${data.room}\n${data.user}`);
    if (online.has(data.user)) online.set(data.user, data.node);
    bubble(data);
    showTyping();
  },
  typing({ room, user }) {
    if (user === me || typists.size >= MAX_PEOPLE) return;
    typists.set(`${room}\n${user}`, { room, user, until: Date.now() + TYPING_LASTS });
    showTyping();
  },
  online(data) {
    count = data.count;
    for (const [user, place] of Object.entries(data.came)) online.set(user, place);
    for (const user of data.went) online.delete(user);
    showPeople();
  },
  redis(data) {
    away = data.away;
    showState();
  },
  gap({ room, reason, missed, since, node }) {
    const from = clock(new Date(since));
    const why = reason === "overflow" ? `${node} was too busy` : `${node} had lost Redis`;
    const what = missed === null
      ? `Messages may have been missed since ${from}: ${why}.`
      : `${missed} ${missed === 1 ? "message was" : "messages were"} missed since ${from}.`;
    for (const name of room === null ? rooms.keys() : [room]) line(name, what, "gap");
  },
  error({ text, about, ack }) {
    if (about === "user") {
      $("chat").hidden = true;
      $("welcome").hidden = false;
      $("refused").textContent = text;
    } else if (ack) settle(ack, null, text);
    else note(text, "bad");
  },
};

// -- Rooms and lines ---------------------------------------------------------------------------

function join(name) {
  if (!rooms.has(name)) {
    const tab = element("button", "room", `# ${name}`);
    tab.type = "button";
    tab.append(element("span", "unread"));
    tab.onclick = () => show(name);
    $("rooms").append(tab);
    rooms.set(name, { box: boxOf(name), tab, unread: 0 });
  }
  send("join", { room: name }, (_, error) => {
    if (!error) return;
    rooms.get(name)?.tab.remove();
    rooms.delete(name);
    if (current === name) show(ROOMS[0]);
    note(error, "bad");
  });
}

function boxOf(name) {
  const box = element("div", "box");
  box.dataset.empty = `This is #${name}. Nothing is kept: you see what is said from now on.`;
  return box;
}

function show(name) {
  current = name;
  const { box } = rooms.get(name);
  rooms.get(name).unread = 0;
  $("lines").replaceChildren(box);
  $("lines").scrollTop = $("lines").scrollHeight;
  $("title").textContent = `# ${name}`;
  $("text").placeholder = `Write to #${name}`;
  menu(false);
  showRooms();
  showTyping();
}

function put(room, row) {
  const { box } = rooms.get(room) ?? {};
  if (!box) return;
  const lines = $("lines");
  const atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 80;
  box.append(row);
  while (box.childElementCount > MAX_LINES) box.firstElementChild.remove();
  if (room === current && atEnd) lines.scrollTop = lines.scrollHeight;
}

function line(room, text, kind = "") {
  put(room, element("p", `line ${kind}`, text));
}

const note = (text, kind) => current && line(current, text, kind);

function bubble({ room, user, node, text, time }) {
  const place = rooms.get(room);
  if (!place) return null;
  const last = place.box.lastElementChild;
  const row = element("article", user === me ? "row mine" : "row");
  row.dataset.by = `${user}\n${node}`;
  if (last?.dataset.by === row.dataset.by) row.classList.add("more");
  const head = element("div", "head");
  head.append(element("b", "", user), badgeOf(node), element("time", "", clock(new Date(time), false)));
  const outcome = element("span", "outcome");
  row.append(avatar(user), head, element("div", "text", text), outcome);
  put(room, row);
  if (room !== current) {
    place.unread += 1;
    showRooms();
  }
  return { row, outcome };
}

function say(text) {
  const data = { room: current, text };
  const mine = bubble({ ...data, user: me, node, time: Date.now() });
  mine.row.classList.add("pending");
  saidTyping = 0;
  send("say", data, (answer, error) => {
    const outcome = answer?.outcome ?? (error ? "refused" : "maybe");
    const place = mine.row.dataset.by.split("\n")[1];
    mine.row.classList.replace("pending", outcome.replace(" ", "-"));
    mine.outcome.textContent = {
      sent: "",
      refused: `Not sent: ${error}.`,
      "not sent": `Not sent: only the people on ${place} have it.`,
      maybe: "Perhaps sent: no answer came.",
    }[outcome];
    const lines = $("lines");
    if (mine.outcome.textContent) lines.scrollTop = lines.scrollHeight;
  });
}

// -- What the page shows -----------------------------------------------------------------------

function showState() {
  const [kind, text] = !live ? ["bad", "reconnecting…"]
    : away ? ["away", `${node} · Redis is away`] : ["good", node];
  $("state").className = `state ${kind}`;
  $("state").textContent = text;
  $("send").disabled = !live;
  $("banner").hidden = live && !away;
  $("banner").className = `banner ${kind}`;
  $("banner").textContent = live
    ? `${node} has lost Redis. Only the people on ${node} hear you, and you them, until it is back.`
    : "The connection is cut. What you write waits here until it is back.";
}

function showRooms() {
  let unread = 0;
  for (const [name, room] of rooms) {
    room.tab.classList.toggle("current", name === current);
    room.tab.lastChild.textContent = room.unread || "";
    unread += room.unread;
  }
  $("menu").classList.toggle("news", unread > 0);
  document.title = (unread ? `(${unread}) ` : "") + "eventbus chat";
}

function showPeople() {
  const names = [...online.keys()].sort((a, b) => a.localeCompare(b)).slice(0, MAX_PEOPLE);
  $("people").replaceChildren(...names.map((user) => {
    const item = element("li");
    item.append(avatar(user), element("span", "name", user), badgeOf(online.get(user)));
    if (user === me) item.classList.add("me");
    return item;
  }));
  if (count > names.length) $("people").append(element("li", "rest", `and ${count - names.length} more`));
  $("count").textContent = count;
}

function showTyping() {
  const names = [...typists.values()].filter(({ room }) => room === current).map(({ user }) => user);
  const text = names.length > 2 ? `${names.length} people are typing`
    : names.length ? `${names.join(" and ")} ${names.length > 1 ? "are" : "is"} typing` : "";
  if ($("typing").textContent === text) return;
  $("typing").replaceChildren(text);
  if (text) {
    const dots = element("span", "dots");
    dots.append(element("i"), element("i"), element("i"));
    $("typing").prepend(dots);
  }
}

function element(tag, kind = "", text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

function avatar(user) {
  const made = element("span", "avatar", [...user][0].toUpperCase());
  made.style.setProperty("--hue", hue(user));
  made.ariaHidden = "true";
  return made;
}

function badgeOf(node) {
  const made = element("span", "node", node);
  made.style.setProperty("--hue", NODE_HUES[hue(node) % NODE_HUES.length]);
  return made;
}

// The same colour for a name everywhere. Names that end in a number lie far apart.
function hue(name) {
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0) * 137) % 3600;
  return sum % 360;
}

function clock(date, seconds = true) {
  const two = { hour: "2-digit", minute: "2-digit" };
  return date.toLocaleTimeString([], seconds ? { ...two, second: "2-digit" } : two);
}

function menu(open) {
  $("chat").classList.toggle("open", open);
  $("menu").ariaExpanded = String(open);
}

// -- What the user does ------------------------------------------------------------------------

function come(name) {
  me = name.trim();
  $("refused").textContent = "";
  sessionStorage.setItem("user", me);
  connect();
}

$("welcome").onsubmit = (event) => {
  event.preventDefault();
  come($("user").value);
};
$("say").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || !live) return;
  say(text);
  $("text").value = "";
  $("text").style.height = "";
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("say").requestSubmit();
  }
};
$("text").oninput = () => {
  $("text").style.height = "";
  $("text").style.height = `${$("text").scrollHeight}px`;
  if (Date.now() - saidTyping > TYPING_EVERY && $("text").value) {
    saidTyping = Date.now();
    send("typing", { room: current });
  }
};
$("enter").onsubmit = (event) => {
  event.preventDefault();
  const name = $("room").value.trim();
  $("room").value = "";
  if (!name || !live) return;
  join(name);
  show(name);
};
$("menu").onclick = () => menu(!$("chat").classList.contains("open"));
document.querySelector("main").onclick = ({ target }) => target.closest("#menu") || menu(false);

const known = new URLSearchParams(location.search).get("user") ?? sessionStorage.getItem("user");
if (known) {
  $("user").value = known;
  come(known);
}
