/* A 32-bit server without a C library: bind32 PORT DIRECT, where DIRECT is 1 for bind(2), listen(2) and so on by their own
 * numbers (Linux 4.3) and 0 for socketcall(2). Prints `serving`, answers one client with `32` and ends; errors are its status.
 * With port 0 it does nothing. */

static int call(int number, long a, long b, long c) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(0) : "memory");
    return result;
}

enum { EXIT = 1, WRITE = 4, SOCKETCALL = 102, SOCKET = 359, BIND = 361, LISTEN = 363, ACCEPT4 = 364 };

static int network(int direct, int number, int part, long a, long b, long c) {
    long arguments[] = {a, b, c};
    return direct ? call(number, a, b, c) : call(SOCKETCALL, part, (long)arguments, 0);
}

static void require(int result) {
    if (result < 0)
        call(EXIT, -result, 0, 0);
}

__attribute__((used)) static void run(long *stack) {
    const char *text = (const char *)stack[2];
    int direct = *(const char *)stack[3] == '1';
    unsigned port = 0;
    while (*text)
        port = port * 10 + (unsigned)(*text++ - '0');
    if (!port)
        call(EXIT, 0, 0, 0);
    unsigned char address[16] = {2, 0, (unsigned char)(port >> 8), (unsigned char)port, 127, 0, 0, 1};
    int server = network(direct, SOCKET, 1, 2, 1, 0);
    require(server);
    require(network(direct, BIND, 2, server, (long)address, sizeof address));
    require(network(direct, LISTEN, 4, server, 1, 0));
    call(WRITE, 1, (long)"serving\n", 8);
    int client = direct ? call(ACCEPT4, server, 0, 0) : network(0, 0, 5, server, 0, 0);
    require(client);
    call(WRITE, client, (long)"32", 2);
    call(EXIT, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %esp, %eax\n and $-16, %esp\n sub $12, %esp\n push %eax\n call run\n");
