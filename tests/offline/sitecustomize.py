"""Nothing but this machine can be reached: imported by the tests, and by every Python process they start (it is on their PYTHONPATH).

A refused attempt is also written to the file that LLMFT_REFUSED names, because libraries like to swallow the error."""

import atexit
import gc
import ipaddress
import os
import socket
import sys

real_connect, real_connect_ex, real_sendto, real_getaddrinfo = (
    socket.socket.connect,
    socket.socket.connect_ex,
    socket.socket.sendto,
    socket.getaddrinfo,
)
local_names = {None, '', b'', 'localhost', 'localhost.localdomain', 'ip6-localhost', socket.gethostname()}


def is_local(host):
    "Whether `host` is this machine: a loopback or wildcard address, or its own name."
    host = host.decode() if isinstance(host, bytes) else host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in local_names
    return address.is_loopback or address.is_unspecified


def refuse(what):
    "Note the attempt and raise what a machine without a network would."
    if note := os.environ.get('LLMFT_REFUSED'):
        with open(note, 'a') as file:
            file.write(f'{what} by {" ".join(sys.argv[:3])}\n')
    raise OSError(f'tests may not use the network: {what}')


def guard(real, what):
    "`real`, a method of a socket whose last argument is an address, refusing all but this machine."

    def call(self, *args):
        address = args[-1]
        harmless = self.family not in (socket.AF_INET, socket.AF_INET6) or (
            what == 'connect' and self.type & socket.SOCK_DGRAM
        )  # sends nothing
        if not harmless and isinstance(address, tuple) and not is_local(address[0]):
            refuse(f'{what} {address}')
        return real(self, *args)

    return call


def getaddrinfo(host, *args, **kwargs):
    if not is_local(host):
        refuse(f'lookup of {host}')
    return real_getaddrinfo(host, *args, **kwargs)


atexit.register(gc.freeze)  # the last collection takes two seconds where PyTorch was imported
if not hasattr(socket, 'only_this_machine'):
    socket.only_this_machine = True
    socket.socket.connect, socket.socket.connect_ex = guard(real_connect, 'connect'), guard(real_connect_ex, 'connect')
    socket.socket.sendto, socket.getaddrinfo = guard(real_sendto, 'sendto'), getaddrinfo
