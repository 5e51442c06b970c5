// A server on a passed descriptor, which ends when it has answered what it was asked: drains.js FD
const http = require('http')
let isEnding = false
const server = http.createServer((request, response) => {
  if (isEnding) response.setHeader('Connection', 'close')
  response.end(`hello from ${process.pid}`)
})
server.listen({ fd: Number(process.argv[2]) })
process.on('SIGTERM', () => {
  isEnding = true
  server.close()
  server.closeIdleConnections()
})
