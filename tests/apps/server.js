// A Node http server on $PORT, or on the descriptor that its only argument names.
const http = require('node:http')

const place = process.argv[2] ? { fd: Number(process.argv[2]) } : process.env.PORT
http.createServer((_, answer) => answer.end(`hello from ${process.pid}`)).listen(place)
