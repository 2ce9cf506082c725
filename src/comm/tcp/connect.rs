//! Connects every rank to every other.
//!
//! Each rank listens at a port of its own before the rendezvous, at which all get the addresses of all. Then each
//! connects to the ranks before it, in order, and accepts those behind it. Both sides of a connection prove that they
//! know the secret, and that they were at this very rendezvous.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};

use sha2::{Digest, Sha256};

use super::rendezvous::{Rendezvous, cannot_listen, nonce, rendezvous_error, wrongly_given};
use crate::Error;

/// The address of this machine at which the other ranks reach it.
const ADDRESS: &str = "BURN_PARALLEL_ADDRESS";

/// Connections to all ranks, `None` for this one.
pub(super) fn connect(rendezvous: &Rendezvous) -> Result<Vec<Option<TcpStream>>, Error> {
    let (rank, size) = (rendezvous.rank(), rendezvous.size());
    if size <= 1 {
        return Ok((0..size).map(|_| None).collect());
    }
    let address = own_address(rendezvous)?;
    let cannot = |problem: std::io::Error| {
        let advice = format!("{ADDRESS} must be an address of the machine it is set on");
        cannot_listen((&format!("rank {rank} cannot listen at {address}"), &problem), &advice)
    };
    let listener = TcpListener::bind((address, 0)).map_err(cannot)?;
    let own = listener.local_addr().map_err(cannot)?;
    let addresses = rendezvous.all_gather(&[&nonce()[..], own.to_string().as_bytes()].concat())?;
    // Only the ranks at this rendezvous know this hash.
    let world = Sha256::digest(addresses.concat());
    let mut streams = Vec::with_capacity(size);
    for (other, told) in addresses.iter().enumerate().take(rank) {
        let at = told.get(nonce().len()..).and_then(|text| std::str::from_utf8(text).ok()?.parse::<SocketAddr>().ok());
        let at = at.ok_or_else(|| rendezvous_error(format!("the address of rank {other} is garbled")))?;
        streams.push(Some(rendezvous.hosted_by(other, at).connect_to_host(&world, 0, false)?.0));
    }
    streams.push(None);
    let host = rendezvous.hosted_by(rank, own);
    let mut clients = host.receive(&listener, rank + 1..size, |client| {
        let other = client.blob != world[..];
        other.then(|| format!("rank {} was at another rendezvous than rank {rank}", client.rank))
    })?;
    host.reply(&mut clients, Ok(&[]));
    streams.extend(clients.into_iter().map(|client| Some(client.stream)));
    Ok(streams)
}

/// The address of this machine on the route to rank 0.
fn own_address(rendezvous: &Rendezvous) -> Result<IpAddr, Error> {
    if let Ok(value) = std::env::var(ADDRESS) {
        return value.trim().parse().map_err(|_| Error::Environment {
            variable: ADDRESS,
            value,
            expected: "an IP address of this machine",
        });
    }
    let (address, port) = rendezvous.point();
    let way = |at: SocketAddr| {
        let any: IpAddr = if at.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
        // Connecting a datagram socket sends nothing, and tells the route.
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(at)?;
        socket.local_addr().map(|own| own.ip())
    };
    let ways = rendezvous.point().to_socket_addrs().and_then(|ats| {
        let mut last = Err(std::io::ErrorKind::AddrNotAvailable.into());
        for at in ats {
            last = way(at);
            if last.is_ok() {
                break;
            }
        }
        last
    });
    ways.map_err(|problem| {
        wrongly_given(format!(
            "rank {} finds no way to rank 0 at {address}:{port}: {problem}; is MASTER_ADDR right? {ADDRESS} says which \
             address of this machine to use",
            rendezvous.rank()
        ))
    })
}
