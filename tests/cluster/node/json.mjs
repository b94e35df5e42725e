// One JSON value a line, both ways; bytes travel as {"$bytes": hex}.

import { createInterface } from "node:readline";

export const plain = (value) => {
  if (value instanceof Uint8Array) return { $bytes: Buffer.from(value).toString("hex") };
  if (Array.isArray(value)) return value.map(plain);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, plain(one)]));
};

export const rich = (value) => {
  if (Array.isArray(value)) return value.map(rich);
  if (value === null || typeof value !== "object") return value;
  if ("$bytes" in value) return Buffer.from(value.$bytes, "hex");
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, rich(one)]));
};

export const say = (value) => process.stdout.write(`${JSON.stringify(plain(value))}\n`);

// Hand each line of stdin over; the program ends when there are no more.
export const listen = (handle) =>
  createInterface({ input: process.stdin })
    .on("line", (line) => handle(rich(JSON.parse(line))))
    .on("close", () => process.exit(0));
