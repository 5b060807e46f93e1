// What the worker and the producer of BullMQ share. Marks: see ../marks.py; hrtime is the same monotonic clock.
import { openSync, readSync, writeSync } from "node:fs";

const RECORD = 24;
export const queueName = process.env.BENCH_QUEUE;
const redis = new URL(process.env.BENCH_REDIS);
export const connection = { host: redis.hostname, port: Number(redis.port), maxRetriesPerRequest: null };
const marks = openSync(process.env.BENCH_MARKS, "r+");

export function now() {
  return Number(process.hrtime.bigint()) / 1e9;
}

export function begin(number) {
  const record = Buffer.alloc(8);
  record.writeDoubleLE(now());
  writeSync(marks, record, 0, 8, number * RECORD);
}

export function end(number) {
  const record = read(number).subarray(8);
  record.writeBigUInt64LE(record.readBigUInt64LE(8) + 1n, 8);
  record.writeDoubleLE(now(), 0);
  writeSync(marks, record, 0, 16, number * RECORD + 8);
}

export function begun(number) {
  return read(number).readDoubleLE(0);
}

function read(number) {
  const record = Buffer.alloc(RECORD);
  readSync(marks, record, 0, RECORD, number * RECORD);
  return record;
}
