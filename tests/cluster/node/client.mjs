// Clients of Socket.IO. A line of stdin, {"open": name, "port": port, "namespace": "/"}, opens one,
// and {"close": name} closes it. What happens is said as {"client": name, "connected": id},
// {"client": name, "event": [...]} and {"client": name, "disconnected": reason}. They never come back
// by themselves.

import { io } from "socket.io-client";

import { listen, say } from "./json.mjs";

const sockets = new Map();

listen(({ open: client, port, namespace, close }) => {
  if (close) return sockets.get(close).disconnect();
  const socket = io(`http://127.0.0.1:${port}${namespace}`, {
    forceNew: true,
    reconnection: false,
    transports: ["websocket"],
  });
  socket.on("connect", () => say({ client, connected: socket.id }));
  socket.on("connect_error", (error) => say({ client, refused: error.message }));
  socket.on("disconnect", (reason) => say({ client, disconnected: reason }));
  socket.onAny((...event) => say({ client, event }));
  sockets.set(client, socket);
});
