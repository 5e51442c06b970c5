// Two Node workers behind one number, or behind the descriptor that the only argument names; see server.js.
const cluster = require('node:cluster')

if (cluster.isPrimary) {
  cluster.fork()
  cluster.fork()
} else {
  require('./server.js')
}
