# SPDX-License-Identifier: Apache-2.0
"""Settings of a network namespace below /proc/sys/net, for the namespace of whoever reads or writes them.

Images have lists without names: the order is the format (CRIU's criu/net.c). What they have no place for, and is not as
in a new namespace, is told by the dump.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stasis.linux.namespaces import FLAGS, unshare
from stasis.process.helpers import fork_helper, wait_for_helper
from stasis.process.images.schema.common import SysctlEntry, SysctlType

__all__ = ["changed", "read_list", "unix_settings", "write_list"]

ROOT = Path("/proc/sys/net")
IPV4 = (
    "accept_local", "accept_redirects", "accept_source_route", "arp_accept", "arp_announce", "arp_filter", "arp_ignore",
    "arp_notify", "bootp_relay", "disable_policy", "disable_xfrm", "force_igmp_version", "forwarding",
    "igmpv2_unsolicited_report_interval", "igmpv3_unsolicited_report_interval", "log_martians", "medium_id",
    "promote_secondaries", "proxy_arp", "proxy_arp_pvlan", "route_localnet", "rp_filter", "secure_redirects",
    "send_redirects", "shared_media", "src_valid_mark", "tag", "ignore_routes_with_linkdown", "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
)  # fmt: skip
IPV6 = (
    "accept_dad", "accept_ra", "accept_ra_defrtr", "accept_ra_from_local", "accept_ra_min_hop_limit", "accept_ra_mtu",
    "accept_ra_pinfo", "accept_ra_rt_info_max_plen", "accept_ra_rtr_pref", "accept_redirects", "accept_source_route",
    "autoconf", "dad_transmits", "disable_ipv6", "drop_unicast_in_l2_multicast", "drop_unsolicited_na",
    "force_mld_version", "force_tllao", "forwarding", "hop_limit", "ignore_routes_with_linkdown", "keep_addr_on_down",
    "max_addresses", "max_desync_factor", "mldv1_unsolicited_report_interval", "mldv2_unsolicited_report_interval",
    "mtu", "ndisc_notify", "optimistic_dad", "proxy_ndp", "regen_max_retry", "router_probe_interval",
    "router_solicitation_delay", "router_solicitation_interval", "router_solicitations", "stable_secret",
    "suppress_frag_ndisc", "temp_prefered_lft", "temp_valid_lft", "use_oif_addrs_only", "use_optimistic",
    "use_tempaddr",
)  # fmt: skip
NAMES = {"ipv4": IPV4, "ipv6": IPV6}
TEXTS = {"stable_secret"}
UNIX = ("max_dgram_qlen",)
LAST = "accept_redirects"
"""Its meaning depends on `forwarding`, so it is written behind it."""


def read_list(protocol: str, device: str) -> list[SysctlEntry]:
    """What is set for a device, or for "all" or "default"; without a value where this kernel has none of that name."""
    return [_entry(ROOT / protocol / "conf" / device / name) for name in NAMES[protocol]]


def unix_settings() -> list[SysctlEntry]:
    """Those of unix sockets."""
    return [_entry(ROOT / "unix" / name) for name in UNIX]


def _entry(path: Path) -> SysctlEntry:
    kind = SysctlType.CTL_STR if path.name in TEXTS else SysctlType.CTL_32
    try:
        text = path.read_text().strip()
    except OSError:
        return SysctlEntry(type=kind)  # not in this kernel, or no secret was chosen
    return SysctlEntry(type=kind, sarg=text) if path.name in TEXTS else SysctlEntry(type=kind, iarg=int(text))


def write_list(protocol: str, device: str, wanted: Sequence[SysctlEntry]) -> None:
    """Set what is not so already. "unix" as the protocol has no devices."""
    base = ROOT / "unix" if protocol == "unix" else ROOT / protocol / "conf" / device
    names = UNIX if protocol == "unix" else NAMES[protocol]
    pairs = sorted(zip(names, wanted, strict=False), key=lambda pair: pair[0] == LAST)
    for name, entry in pairs:
        value = entry.sarg if name in TEXTS else entry.iarg
        now = _entry(base / name)
        if value is not None and value != (now.sarg if name in TEXTS else now.iarg):
            (base / name).write_text(str(value))


def changed() -> list[str]:
    """Names of settings that are not as in a new namespace and that images have no place for, as in sysctl(8)."""
    covered = {f"ipv4/conf/{name}" for name in IPV4} | {f"ipv6/conf/{name}" for name in IPV6} | {"unix/max_dgram_qlen"}
    ours, fresh = dict(_all()), dict(_fresh())
    return sorted(name.replace("/", ".") for name, value in ours.items()
                  if name in fresh and fresh[name] != value and _without_device(name) not in covered)  # fmt: skip


def _without_device(name: str) -> str:
    parts = name.split("/")
    return "/".join((*parts[:2], parts[3])) if len(parts) == 4 and parts[1] == "conf" else name


def _all() -> Iterator[tuple[str, str]]:
    for directory, _, files in os.walk(ROOT):
        for name in files:
            path = Path(directory) / name
            try:
                yield str(path.relative_to(ROOT)), path.read_text()
            except OSError:
                continue  # write-only, or no value yet


def _fresh() -> Iterator[tuple[str, str]]:
    """The same of a new namespace, which a child looks at."""
    reader, writer = os.pipe()
    child = fork_helper()
    if child == 0:
        try:
            unshare(FLAGS["net"])
            with open(writer, "w", errors="surrogateescape") as told:
                for name, value in _all():
                    told.write(f"{name}\0{value}\0")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, errors="surrogateescape") as told:
        words = told.read().split("\0")[:-1]
    wait_for_helper(child)
    yield from zip(words[::2], words[1::2], strict=True)
