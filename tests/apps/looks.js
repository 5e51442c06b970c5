// Looks whether its number is free, as dev servers do, and serves later: looks.js SERVE-HOST MILLISECONDS LOOK-HOST...
const net = require('net')
const http = require('http')
const [host, delay, ...looks] = process.argv.slice(2)
const port = Number(process.env.PORT)

function serve() {
  http.createServer((request, response) => response.end(`served on ${host}\n`)).listen(port, host)
}

function look() {
  if (looks.length === 0) {
    setTimeout(serve, Number(delay))
    return
  }
  const probe = net.createServer()
  probe.listen(port, looks.shift(), () => probe.close(look))
}

look()
