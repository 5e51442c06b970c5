import java.nio.ByteBuffer;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;

/** Answers on the listening socket that is its standard input, as inetd would hand it over. */
class Inherited {
    public static void main(String[] arguments) throws Exception {
        ServerSocketChannel listener = (ServerSocketChannel) System.inheritedChannel();
        String body = "hello from " + ProcessHandle.current().pid();
        String answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: " + body.length() + "\r\n\r\n" + body;
        while (true) {
            try (SocketChannel connection = listener.accept()) {
                connection.read(ByteBuffer.allocate(65536));
                connection.write(ByteBuffer.wrap(answer.getBytes()));
            }
        }
    }
}
