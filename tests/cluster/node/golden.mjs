// What Socket.IO's own emitter publishes for the calls in golden.json: node golden.mjs [--write].
// A call is a list of steps, [method, ...arguments]; a step without arguments may be a property.

import { readFileSync, writeFileSync } from "node:fs";

import { Emitter } from "@socket.io/redis-emitter";

import { rich } from "./json.mjs";

const file = new URL("golden.json", import.meta.url);
const found = JSON.parse(readFileSync(file, "utf8")).map(({ steps }) => {
  let channel, payload;
  const client = { publish: (name, bytes) => ([channel, payload] = [name, Buffer.from(bytes)]) };
  let at = new Emitter(client);
  for (const [method, ...args] of rich(steps)) {
    at = typeof at[method] === "function" ? at[method](...args) : at[method];
  }
  const isJson = payload[0] === "{".charCodeAt();
  return { steps, channel, ...(isJson ? { json: `${payload}` } : { msgpack: payload.toString("hex") }) };
});
const text = `[\n${found.map((one) => `  ${JSON.stringify(one)}`).join(",\n")}\n]\n`;
if (process.argv[2] === "--write") writeFileSync(file, text);
else process.stdout.write(text);
