"""Names, addresses and network interfaces of this host, as gloo and NCCL will choose among them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_dml.doctor.findings import Finding, Setting, note, ok, problem, warning
from dist_dml.listening import is_loopback

# Bridges of this host only: other hosts have some of the same name and address.
_BRIDGES = ("docker", "br-", "virbr", "veth", "cni", "flannel", "kube", "podman", "lxc")
_SLOW_MEGABITS = 1000


@dataclass(frozen=True)
class Interface:
    """A network interface.

    Attributes:
        addresses: of IPv4 and IPv6.
        is_up: whether it is.
        megabits: its speed as the driver states it; 0 where it does not.
    """

    name: str
    addresses: tuple[str, ...]
    is_up: bool
    megabits: int


def interface_list() -> list[Interface]:
    """The interfaces of this host."""
    states = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        texts = tuple(a.address.split("%")[0] for a in addresses if a.family in families)
        state = states.get(name)
        up, speed = (state.isup, state.speed) if state else (False, 0)
        found.append(Interface(name, texts, up, speed))
    return found


def network_findings(setting: Setting) -> Iterator[Finding]:
    """What workers of this host will connect by."""
    interfaces = interface_list()
    several, alone = setting.several_hosts, setting.ranks.size == 1
    own = [i for i in interfaces if i.is_up and i.addresses and not _is_loop(i)]
    shown = ", ".join(_described(interface) for interface in own) or "none besides the loopback"
    yield ok("interfaces", shown, names=[interface.name for interface in own])
    yield own_name(
        socket.gethostname(),
        resolve(socket.gethostname()),
        interfaces,
        several,
        alone,
        setting.environment,
    )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = setting.environment.get(variable, "")
        if value:
            yield chosen_interface(variable, value, interfaces, several)
    if master := setting.environment.get("MASTER_ADDR", ""):
        yield meeting_point(master, resolve(master), several)
    yield from adapters(setting.system, setting.environment, several)


def resolve(name: str) -> list[str]:
    """The addresses of a name; none where it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]).split("%")[0] for entry in found))


def own_name(
    name: str,
    addresses: Sequence[str],
    interfaces: Sequence[Interface],
    several_hosts: bool,
    alone: bool,
    environment: Mapping[str, str],
) -> Finding:
    """The finding about this host's own name, by which gloo finds the address that it announces.

    Args:
        name: of the host.
        addresses: that the name has here.
        interfaces: of the host.
        several_hosts: whether workers of others must reach it.
        alone: whether there is one worker.
        environment: GLOO_SOCKET_IFNAME takes the choice away from the name.
    """
    remedy = (
        "GLOO_SOCKET_IFNAME=INTERFACE (and NCCL_SOCKET_IFNAME) of the network of the workers, or "
        f"correct {name} in /etc/hosts"
    )
    values = {"host": name, "addresses": list(addresses)}
    if environment.get("GLOO_SOCKET_IFNAME"):
        return ok("host name", f"{name}; GLOO_SOCKET_IFNAME chooses the address", **values)
    if not addresses:
        measured = f"{name} has no address here"
        if several_hosts:
            return problem("host name", f"{measured}: others cannot connect", remedy, **values)
        if alone:
            return note("host name", f"{measured}; several workers need one", remedy, **values)
        return warning("host name", f"{measured}: gloo takes the loopback", remedy, **values)
    if not all(map(is_loopback, addresses)):
        first = next(address for address in addresses if not is_loopback(address))
        of_host = next((i.name for i in interfaces if first in i.addresses), "")
        measured = f"{name} is {first}" + (f" ({of_host})" if of_host else "")
        if not of_host and not alone:
            text = f"{measured}, which is no address of this host"
            return warning("host name", f"{text}: gloo cannot listen there", remedy, **values)
        if several_hosts and of_host.startswith(_BRIDGES):
            text = f"{measured}: a bridge that other hosts do not reach"
            return problem("host name", text, remedy, **values)
        return ok("host name", measured, **values)
    measured = f"{name} is {', '.join(addresses)}"
    if several_hosts:
        text = f"{measured}: gloo would tell other hosts to connect to themselves"
        return problem("host name", text, remedy, **values)
    return ok("host name", f"{measured}; enough for workers of one host", **values)


def chosen_interface(
    variable: str, value: str, interfaces: Sequence[Interface], several_hosts: bool
) -> Finding:
    """The finding about a variable that names interfaces.

    gloo takes names, NCCL beginnings of names; `=` before them asks for whole ones, `^` for all
    others.

    Args:
        variable: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.
        value: of it.
        interfaces: of the host.
        several_hosts: whether workers of others must reach it.
    """
    names = [interface.name for interface in interfaces if interface.is_up]
    remedy = f"{variable}=NAME of one of {', '.join(names)}"
    nccl = variable.startswith("NCCL")
    without = nccl and value.startswith("^")
    words = [word for word in value.lstrip("^=").split(",") if word]
    exact = not nccl or value.lstrip("^").startswith("=")

    def fits(name: str, word: str) -> bool:
        return name == word if exact else name.startswith(word)

    taken = [name for name in names if any(fits(name, w) for w in words) != without]
    if not taken:
        return problem(variable, f"{value!r} names no interface of this host", remedy)
    if several_hosts and all(_is_loop(i) for i in interfaces if i.name in taken):
        text = f"{value!r} is the loopback: other hosts cannot connect"
        return problem(variable, text, remedy)
    described = [_described(i) for i in interfaces if i.name in taken]
    return ok(variable, f"{value}: {', '.join(described)}", names=taken)


def meeting_point(master: str, addresses: Sequence[str], several_hosts: bool) -> Finding:
    """The finding about MASTER_ADDR.

    Args:
        master: its value.
        addresses: that it has here.
        several_hosts: whether workers of others must reach it.
    """
    remedy = "MASTER_ADDR (torchrun --master-addr, --rdzv-endpoint) = an address of worker 0's host"
    if not addresses:
        return problem("MASTER_ADDR", f"{master} has no address here", remedy)
    if several_hosts and all(map(is_loopback, addresses)):
        text = f"{master} is {addresses[0]}: each host would wait for itself"
        return problem("MASTER_ADDR", text, remedy)
    return ok("MASTER_ADDR", f"{master} is {addresses[0]}")


def adapters(
    system: Path, environment: Mapping[str, str], several_hosts: bool
) -> Iterator[Finding]:
    """Findings about InfiniBand and RoCE ports, which NCCL prefers to sockets.

    Args:
        system: root of /sys.
        environment: NCCL_IB_DISABLE.
        several_hosts: whether they are needed.
    """
    active, idle = [], []
    for port in sorted((system / "sys/class/infiniband").glob("*/ports/*")):
        name = f"{port.parent.parent.name}/{port.name}"
        state, rate = _line(port / "state"), _line(port / "rate")
        (active if "ACTIVE" in state else idle).append(f"{name} ({rate or state})")
    if idle and several_hosts:
        yield warning(
            "InfiniBand",
            f"not active: {', '.join(idle)}",
            "cable, switch or subnet manager (ibstat); NCCL_IB_HCA=NAMES leaves a port out",
        )
    if active and environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        yield warning(
            "InfiniBand",
            f"NCCL_IB_DISABLE={environment['NCCL_IB_DISABLE']}, and there is {', '.join(active)}",
            "unset NCCL_IB_DISABLE: sockets are several times slower",
        )
    elif active:
        yield ok("InfiniBand", ", ".join(active))


def _is_loop(interface: Interface) -> bool:
    return bool(interface.addresses) and all(map(_loops, interface.addresses))


def _loops(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _described(interface: Interface) -> str:
    first = interface.addresses[0] if interface.addresses else "no address"
    speed = f" {interface.megabits / 1000:g} Gb/s" if interface.megabits >= _SLOW_MEGABITS else ""
    if 0 < interface.megabits < _SLOW_MEGABITS:
        speed = f" {interface.megabits} Mb/s"
    return f"{interface.name} {first}{speed}"


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
