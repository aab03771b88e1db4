//! `[cache]`: sizes and keys of the response cache.

use super::super::table_reader::{RenamedKey, TableReader};
use super::super::value_kind::{Boolean, IntegerRange, OneOf, ParsedString, SizeRange};
use super::bounds::{GIB, KIB, MIB, index, index_of};
use super::{formats, limits};
use crate::cache;

pub(super) fn read(root: &TableReader<'_>) -> cache::CacheConfig {
    const QUERY_ORDER: OneOf<bool> = OneOf(&[("kept", Some(false)), ("sorted", Some(true))]);
    const STATUS_KEY: OneOf<bool> = OneOf(&[("hide", Some(false)), ("tell", Some(true))]);
    const HONOUR_CLIENT: OneOf<cache::HonourClient> = OneOf(&[
        ("full", Some(cache::HonourClient::Full)),
        ("limited", Some(cache::HonourClient::Limited)),
        ("off", Some(cache::HonourClient::Off)),
    ]);
    const TO_CLIENTS: OneOf<bool> = OneOf(&[("pass", Some(false)), ("strip", Some(true))]);
    const INFLIGHT_FETCH_BYTES: RenamedKey = RenamedKey { name: "inflight_fetch_bytes", former: "fill_bytes" };
    const PER_SECOND: ParsedString<u32> = ParsedString {
        name: "a rate such as \"1000/s\"",
        pattern: limits::RATE_PATTERN,
        parse: |text| {
            limits::parse_rate(text).map(|rate| rate.count().div_ceil(rate.seconds()).try_into().unwrap_or(u32::MAX))
        },
        format: |rate| format!("{rate}/s"),
    };
    let default = cache::CacheConfig::default();
    root.table("cache", |table| cache::CacheConfig {
        memory_bytes: table.value_or("memory", &SizeRange(MIB..=1_024 * GIB), default.memory_bytes),
        hot_rate: table.value_or("hot_rate", &PER_SECOND, default.hot_rate),
        object_bytes: table.value_or("object_bytes", &SizeRange(KIB..=4 * GIB), default.object_bytes),
        remote_object_bytes: table.value_or(
            "remote_object_bytes",
            &SizeRange(KIB..=64 * MIB),
            default.remote_object_bytes,
        ),
        inflight_fetch_bytes: table.renamed_or(
            &INFLIGHT_FETCH_BYTES,
            &SizeRange(MIB..=1_024 * GIB),
            default.inflight_fetch_bytes,
        ),
        key_ignore_query: formats::list(table, "key_ignore_query", formats::QUERY_PATTERN, default.key_ignore_query),
        key_sort_query: table.value_or("key_query_order", &QUERY_ORDER, default.key_sort_query),
        key_fields: formats::list(table, "key_fields", formats::FIELD_NAME, default.key_fields),
        exposes_key: table.value_or("status_key", &STATUS_KEY, default.exposes_key),
        heuristic: table.value_or("heuristic", &Boolean, default.heuristic),
        variants: index(table.value_or("variants", &IntegerRange(1..=1_024), index_of(default.variants))),
        targeted: formats::list(table, "targeted", formats::FIELD_NAME, default.targeted),
        strip_targeted: table.value_or("targeted_to_clients", &TO_CLIENTS, default.strip_targeted),
        honour_client: table.value_or("honour_client", &HONOUR_CLIENT, default.honour_client),
        paths: default.paths,
    })
}
