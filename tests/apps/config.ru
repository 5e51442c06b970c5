# A Rack application that says which process answers.
run ->(_) { [200, { "content-type" => "text/plain" }, ["hello from #{Process.pid}"]] }
