// Node's modules of the network: a server of each kind, and a client that asks them all.
//
//   node sockets.js serve PORT DIRECTORY             on PORT (net), +1 (http), +2 (https, HTTP/2), +3 (tls), +4 (dgram)
//   node sockets.js ask PORT DIRECTORY ADDRESS
'use strict';
const assert = require('node:assert');
const crypto = require('node:crypto');
const dgram = require('node:dgram');
const fs = require('node:fs');
const http = require('node:http');
const http2 = require('node:http2');
const https = require('node:https');
const net = require('node:net');
const tls = require('node:tls');
const { once } = require('node:events');
const { pipeline } = require('node:stream/promises');

const [, , what, first, directory, address] = process.argv;
const port = Number(first);
const cert = fs.readFileSync(`${directory}/tls.crt`);
const sha = (data) => crypto.createHash('sha256').update(data).digest('hex');

// All that comes. (Of stream/consumers, `buffer` destroys a socket that is to answer yet.)
async function buffer(stream) {
  const parts = [];
  stream.on('data', (part) => parts.push(part));
  await once(stream, 'end');
  return Buffer.concat(parts);
}

async function serve() {
  const key = fs.readFileSync(`${directory}/tls.key`);
  // Answers with what came, once all has come.
  const late = async (socket) => socket.end(await buffer(socket));
  const respond = async (request, response) => {
    const body = await buffer(request);
    response.setHeader('x-digest', sha(body));
    response.end(body);
  };
  const servers = [
    net.createServer({ allowHalfOpen: true }, (socket) => late(socket).catch(() => {})),
    http.createServer(respond),
    http2.createSecureServer({ key, cert, allowHTTP1: true }, respond),
    tls.createServer({ key, cert }, (socket) => socket.pipe(socket).on('error', () => {})),
  ];
  for (const [i, server] of servers.entries()) await once(server.listen(port + i, '::'), 'listening');
  const socket = dgram.createSocket({ type: 'udp6' });
  socket.on('message', (message, from) => socket.send(message, from.port, from.address));
  await once(socket.bind(port + 4, '::'), 'listening');
  console.log('ready');
}

async function ask() {
  const url = address.includes(':') ? `[${address}]` : address;
  const done = [];

  // net: large and half-closed, many at once, refused, a time-out while nobody answers.
  const data = crypto.randomBytes(16 << 20);
  const echo = async (data) => {
    const socket = net.connect({ port, host: address, allowHalfOpen: true });
    socket.end(data);
    return buffer(socket);
  };
  assert.equal(sha(await echo(data)), sha(data));
  const many = Array.from({ length: 200 }, (_, i) => crypto.randomBytes(i * 100));
  const back = await Promise.all(many.map(echo));
  back.forEach((data, i) => assert.ok(data.equals(many[i])));
  const [error] = await once(net.connect({ port: 9, host: address }).on('connect', assert.fail), 'error');
  assert.equal(error.code, 'ECONNREFUSED');
  done.push('net');

  // http: one connection for all of an agent's requests, and 16 at a time.
  const request = async (module, options, body) => {
    const asking = module.request({ host: address, method: 'POST', path: '/', ...options });
    asking.end(body);
    const [response] = await once(asking, 'response');
    const got = await buffer(response);
    assert.equal(response.headers['x-digest'], sha(body));
    assert.ok(got.equals(body));
  };
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  for (let i = 0; i < 200; i++) await request(http, { port: port + 1, agent }, Buffer.from(`request ${i}`));
  agent.destroy();
  const wide = new http.Agent({ keepAlive: true, maxSockets: 16 });
  await Promise.all(many.map((body) => request(http, { port: port + 1, agent: wide }, body)));
  wide.destroy();
  assert.equal(sha(Buffer.from(await (await fetch(`http://${url}:${port + 1}/`, { method: 'POST', body: data })).arrayBuffer())), sha(data));
  done.push('http', 'fetch');

  await request(https, { port: port + 2, ca: cert, servername: 'world.test' }, data);
  const session = http2.connect(`https://${url}:${port + 2}`, { ca: cert, servername: 'world.test' });
  await Promise.all(many.map(async (body) => {
    const stream = session.request({ ':method': 'POST', ':path': '/' });
    stream.end(body);
    assert.ok((await buffer(stream)).equals(body));
  }));
  session.close();
  done.push('https', 'http2');

  const secure = tls.connect({ port: port + 3, host: address, ca: cert, servername: 'world.test' });
  await once(secure, 'secureConnect');
  const received = [];
  secure.on('data', (part) => received.push(part));
  await pipeline([data], secure, { end: false });
  while (received.reduce((sum, part) => sum + part.length, 0) < data.length) await once(secure, 'data');
  assert.equal(sha(Buffer.concat(received)), sha(data));
  secure.destroy();
  done.push('tls');

  // dgram: of any size; what is lost is sent again, as everybody's protocols do.
  const socket = dgram.createSocket(address.includes(':') ? 'udp6' : 'udp4');
  for (const size of [0, 1, 1400, 1473, 9000, 60000]) {
    const message = crypto.randomBytes(size);
    const again = setInterval(() => socket.send(message, port + 4, address), 1000);
    socket.send(message, port + 4, address);
    for (;;) {
      const [got] = await once(socket, 'message');
      if (got.equals(message)) break;
    }
    clearInterval(again);
  }
  socket.close();
  done.push('dgram');
  console.log(done.join(', '));
}

(what === 'serve' ? serve() : ask()).catch((error) => {
  console.error(error);
  process.exit(1);
});
