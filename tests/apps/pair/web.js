// A page whose script asks the API where it runs.
const { createServer } = require("node:http");

const PAGE = `<!doctype html>
<title>Pair</title>
<link rel="icon" href="data:,">
<h1>${process.cwd()}</h1>
<p role="status">asking</p>
<script>
  fetch("${process.env.API_URL}/from-the-page")
    .then((answer) => answer.text())
    .then((text) => (document.querySelector("[role=status]").textContent = text));
</script>
`;

createServer((request, response) => {
  response.setHeader("Content-Type", "text/html");
  response.end(PAGE);
}).listen(process.env.PORT, "127.0.0.1");
