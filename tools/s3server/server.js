// SPDX-License-Identifier: Apache-2.0
// The S3-compatible server of the test suite: node server.js DIRECTORY BUCKET
//
// s3rver speaks the protocol. What S3 promises and s3rver lacks is added here: an object appears whole or not at all,
// also when its sender dies in the middle, listings are sorted and complete, and `If-None-Match: *` refuses to write over
// an object. Prints the port. Lines on standard input make it misbehave: `fail N` answers the next N requests with 503,
// `cut N` drops their connections, `lag N` lists an object only N milliseconds after it was written.
// Ends with its standard input, so that it never outlives the tests.
'use strict';

const fs = require('fs');
const path = require('path');
const readline = require('readline');
const { pipeline } = require('stream/promises');
const crypto = require('crypto');

const S3rver = require('s3rver');
const S3Object = require('s3rver/lib/models/object');

// s3rver hides the place in a listing behind DES, which OpenSSL 3 no longer has.
for (const call of ['createCipheriv', 'createDecipheriv']) {
  const original = crypto[call];
  const twice = buffer => Buffer.concat([buffer, buffer]);
  crypto[call] = (name, key, iv) =>
    name === 'des' ? original('aes-128-cbc', twice(key), twice(iv)) : original(name, key, iv);
}

const [directory, bucket] = process.argv.slice(2);
const staging = path.join(directory, '..', 'staging');
fs.mkdirSync(directory, { recursive: true });
fs.mkdirSync(staging, { recursive: true });

const server = new S3rver({
  port: 0,
  address: '127.0.0.1',
  silent: true,
  directory,
  vhostBuckets: false,
  configureBuckets: [{ name: bucket, configs: [] }],
});
const store = server.store;
const faults = { fail: 0, cut: 0, lag: 0 };
const written = new Map(); // bucket/key: when
let staged = 0;
const PAGE = 100; // short, so that small repositories too have listings of several pages

store.putObject = async function putObject(object) {
  const final = this.getResourcePath(object.bucket, object.key, 'object');
  const temporary = path.join(staging, String(++staged));
  const md5 = crypto.createHash('md5');
  let size = 0;
  await pipeline(
    Buffer.isBuffer(object.content) ? [object.content] : object.content,
    async function* count(source) {
      for await (const chunk of source) {
        md5.update(chunk);
        size += chunk.length;
        yield chunk;
      }
    },
    fs.createWriteStream(temporary),
  );
  const digest = md5.digest('hex');
  // Without a pause from here on: nothing may come between the look and the rename, and deleteObject, which removes
  // empty folders, may not run in between either.
  const folder = path.dirname(final);
  fs.mkdirSync(folder, { recursive: true });
  if (object.onlyNew && fs.existsSync(final)) {
    fs.unlinkSync(temporary);
    return { size, md5: digest, refused: true };
  }
  fs.writeFileSync(`${final}.md5`, digest);
  fs.writeFileSync(this.getResourcePath(object.bucket, object.key, 'metadata.json'), '{}');
  fs.renameSync(temporary, final);
  written.set(`${object.bucket}/${object.key}`, Date.now());
  return { size, md5: digest };
};

store.deleteObject = async function deleteObject(name, key) {
  for (const resource of ['object', 'object.md5', 'metadata.json']) {
    fs.rmSync(this.getResourcePath(name, key, resource), { force: true });
  }
  written.delete(`${name}/${key}`);
};

store.listObjects = async function listObjects(name, { delimiter = '', startAfter = '', prefix = '', maxKeys = 1000 }) {
  const latest = Date.now() - faults.lag;
  const objects = [];
  const commonPrefixes = new Set();
  const keys = [...written].filter(([, time]) => time <= latest).map(([full]) => full);
  const wanted = keys.filter(full => full.startsWith(`${name}/${prefix}`)).map(full => full.slice(name.length + 1));
  for (const key of wanted.filter(each => each > startAfter).sort()) {
    const end = delimiter ? key.indexOf(delimiter, prefix.length) : -1;
    if (end !== -1) {
      commonPrefixes.add(key.slice(0, end + delimiter.length));
    } else if (objects.length === Math.min(maxKeys, PAGE)) {
      return { objects, commonPrefixes: [...commonPrefixes], isTruncated: true };
    } else if (await this.existsObject(name, key)) {
      objects.push(new S3Object(name, key, null, await this.getMetadata(name, key)));
    }
  }
  return { objects, commonPrefixes: [...commonPrefixes], isTruncated: false };
};

function misbehave(ctx, next) {
  if (faults.cut > 0) {
    faults.cut -= 1;
    ctx.respond = false;
    ctx.req.socket.destroy();
    return undefined;
  }
  if (faults.fail > 0) {
    faults.fail -= 1;
    ctx.req.resume(); // a body that nobody reads would block the connection
    ctx.status = 503;
    ctx.body = '<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>';
    return undefined;
  }
  return next();
}

async function putIfNew(ctx, next) {
  if (ctx.method !== 'PUT' || ctx.get('if-none-match') !== '*') return next();
  const putObject = store.putObject;
  let refused = false;
  ctx.store = Object.create(store, {
    putObject: {
      async value(object) {
        const result = await putObject.call(store, Object.assign(object, { onlyNew: true }));
        refused = Boolean(result.refused);
        return result;
      },
    },
  });
  await next();
  if (refused) {
    ctx.status = 412;
    ctx.body = '<?xml version="1.0"?><Error><Code>PreconditionFailed</Code><Message>It exists.</Message></Error>';
  }
  return undefined;
}

server.middleware.unshift(misbehave, putIfNew);

readline.createInterface({ input: process.stdin }).on('line', line => {
  const [kind, count] = line.split(' ');
  faults[kind] = Number(count);
  console.log('ok');
}).on('close', () => process.exit(0));

server.run().then(({ port }) => {
  server.httpServer.keepAliveTimeout = 200; // milliseconds; the tests look for connections that are left open
  console.log(port);
});
