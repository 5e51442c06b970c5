// A net/http server on $PORT, or on descriptor 3 when socket activation announces one.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
)

func listen() (net.Listener, error) {
	if os.Getenv("LISTEN_PID") == fmt.Sprint(os.Getpid()) {
		return net.FileListener(os.NewFile(3, "listener"))
	}
	return net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
}

func hello(answer http.ResponseWriter, _ *http.Request) {
	fmt.Fprintf(answer, "hello from %d", os.Getpid())
}

func main() {
	listener, err := listen()
	if err != nil {
		panic(err)
	}
	panic(http.Serve(listener, http.HandlerFunc(hello)))
}
