//! Writes small databases of countries in MaxMind's format, version 2.0, for tests.
#![allow(dead_code, unreachable_pub, reason = "scenario tests and unit tests compile this module separately")]

use std::net::IpAddr;

/// A record of the search tree: the next node, or the data of a network.
#[derive(Clone, Copy)]
enum Record {
    Empty,
    Node(usize),
    Data(usize),
}

/// A database with the country and the continent of each network. Either may be empty.
pub fn database(kind: &str, networks: &[(&str, &str, &str)]) -> Vec<u8> {
    let mut nodes = vec![[Record::Empty; 2]];
    let mut data = Vec::new();
    for (network, country, continent) in networks {
        let (address, length) = network.split_once('/').expect("a network");
        let length: u32 = length.parse().expect("a length");
        // IPv4 is at `::/96`.
        let (bits, length) = match address.parse().expect("an address") {
            IpAddr::V4(address) => (u128::from(u32::from(address)), length + 96),
            IpAddr::V6(address) => (u128::from(address), length),
        };
        insert(&mut nodes, (bits, length), data.len());
        write_record(&mut data, country, continent);
    }
    let count = nodes.len();
    let mut file = Vec::new();
    for record in nodes.iter().flatten() {
        let value = match record {
            Record::Empty => count,
            Record::Node(node) => *node,
            Record::Data(offset) => count + 16 + offset,
        };
        file.extend_from_slice(&u32::try_from(value).expect("a small tree").to_be_bytes()[1..]);
    }
    file.extend_from_slice(&[0; 16]);
    file.extend_from_slice(&data);
    file.extend_from_slice(b"\xab\xcd\xefMaxMind.com");
    write_metadata(&mut file, kind, count);
    file
}

fn insert(nodes: &mut Vec<[Record; 2]>, (bits, length): (u128, u32), offset: usize) {
    let mut node = 0;
    for depth in 0..length {
        let side = usize::from(bits >> (127 - depth) & 1 == 1);
        if depth + 1 == length {
            nodes[node][side] = Record::Data(offset);
            return;
        }
        node = match nodes[node][side] {
            Record::Node(next) => next,
            _ => {
                nodes.push([Record::Empty; 2]);
                let next = nodes.len() - 1;
                nodes[node][side] = Record::Node(next);
                next
            }
        };
    }
}

fn write_record(out: &mut Vec<u8>, country: &str, continent: &str) {
    let parts = [("country", "iso_code", country), ("continent", "code", continent)];
    let parts: Vec<_> = parts.into_iter().filter(|(_, _, code)| !code.is_empty()).collect();
    begin_map(out, parts.len());
    for (name, key, code) in parts {
        write_text(out, name);
        begin_map(out, 1);
        write_text(out, key);
        write_text(out, code);
    }
}

fn write_metadata(out: &mut Vec<u8>, kind: &str, nodes: usize) {
    begin_map(out, 9);
    for (name, control, bytes) in [
        ("node_count", 6 << 5 | 4, u32::try_from(nodes).expect("a small tree").to_be_bytes().to_vec()),
        ("record_size", 5 << 5 | 1, vec![24]),
        ("ip_version", 5 << 5 | 1, vec![6]),
        ("binary_format_major_version", 5 << 5 | 1, vec![2]),
        ("binary_format_minor_version", 5 << 5, vec![]),
        // An unsigned integer of 64 bits has an extended type.
        ("build_epoch", 1, vec![9 - 7, 1]),
        ("languages", 0, vec![11 - 7]),
    ] {
        write_text(out, name);
        out.push(control);
        out.extend_from_slice(&bytes);
    }
    write_text(out, "database_type");
    write_text(out, kind);
    write_text(out, "description");
    begin_map(out, 1);
    write_text(out, "en");
    write_text(out, "test");
}

fn begin_map(out: &mut Vec<u8>, entries: usize) {
    out.push(7 << 5 | u8::try_from(entries).expect("a small map"));
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    assert!(text.len() < 29, "longer texts have another form");
    out.push(2 << 5 | u8::try_from(text.len()).expect("a short text"));
    out.extend_from_slice(text.as_bytes());
}
