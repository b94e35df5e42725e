// Clients of servers of python-socketio. A line of stdin, {"open": name, "url": url, "auth": {...},
// "answer": value}, opens one, which acknowledges with that value; {"say": name, "event": [...]}
// emits. What happens is said as {"client": name, "connected": id}, {"client": name, "event": [...]},
// {"client": name, "reply": value} and {"client": name, "disconnected": reason}. They never come
// back by themselves.

import { io } from "socket.io-client";

import { listen, say } from "./json.mjs";

const sockets = new Map();

listen(({ open: client, url, auth, answer, say: speaker, event: said }) => {
  if (speaker) {
    sockets.get(speaker).emit(...said, (reply) => say({ client: speaker, reply }));
    return;
  }
  const socket = io(url, { forceNew: true, reconnection: false, auth });
  socket.on("connect", () => say({ client, connected: socket.id }));
  socket.on("connect_error", (error) => say({ client, refused: error.message }));
  socket.on("disconnect", (reason) => say({ client, disconnected: reason }));
  socket.onAny((...event) => {
    if (typeof event.at(-1) === "function") event.pop()(answer);
    say({ client, event });
  });
  sockets.set(client, socket);
});
