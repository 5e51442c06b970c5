// Says where it runs, to pages of everywhere, and leaves a cookie with who asks.
const { createServer } = require("node:http");

createServer((request, response) => {
  console.log(request.method, request.url);
  response.setHeader("Access-Control-Allow-Origin", "*");
  response.setHeader("Set-Cookie", "of=api");
  response.end(process.cwd());
}).listen(process.env.PORT, "127.0.0.1");
