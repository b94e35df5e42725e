// A Socket.IO server of a cluster: node server.mjs '{"redis": URL, "key": "socket.io", "port": 0}'.
// It says {"ready": port} when its subscriptions stand, and {"heard": [...]} for what is emitted to
// the servers. Whoever asks for the namespace "/" or "/admin" gets in.

import { createServer } from "node:http";

import { createAdapter } from "@socket.io/redis-adapter";
import { createClient } from "redis";
import { Server } from "socket.io";

import { listen, say } from "./json.mjs";

const options = JSON.parse(process.argv[2]);
const socket = { reconnectStrategy: 20 };
const pub = createClient({ url: options.redis, socket });
const sub = pub.duplicate();
for (const client of [pub, sub]) client.on("error", () => {}); // it redials by itself
await Promise.all([pub.connect(), sub.connect()]);

const http = createServer();
const io = new Server(http, { adapter: createAdapter(pub, sub, { key: options.key }) });
for (const name of ["/", "/admin"]) {
  io.of(name).on("notice", (...args) => say({ heard: [name, "notice", ...args] }));
}
await sub.ping(); // the adapters' SUBSCRIBE went before it
http.listen(options.port ?? 0, "127.0.0.1", () => say({ ready: http.address().port }));
listen(() => {});
