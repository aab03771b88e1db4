//! `identity.user.jwt`: accepted tokens, and the file or the URL of their verification keys.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use url::Url;

use super::super::constraints;
use super::super::expand::read_file;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{AnyString, ArrayOf, DurationRange, OneOf, ParsedString, Repeats};
use super::formats;
use crate::identify::IdentitySource;
use crate::identify::KeySetUrl;
use crate::identify::jwk_set::JwkSet;
use crate::identify::tokens::{Algorithm, AlgorithmFamily, TokenConfig, TokenKeys, TokenLocation};
use formats::token;

/// A larger clock difference is a misconfigured clock and must be corrected.
const LEEWAY_MAX: Duration = Duration::from_secs(300);

/// An issuer that is away for a day will not come back by itself.
const KEYS_STALE: Duration = Duration::from_secs(24 * 60 * 60);
const KEYS_STALE_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Default of `claim`: the subject of the token (RFC 7519 section 4.1.2).
const DEFAULT_USER_CLAIM: &str = "sub";

const ALGORITHM: OneOf<Algorithm> = OneOf(&[
    ("RS256", Some(Algorithm::RS256)),
    ("RS384", Some(Algorithm::RS384)),
    ("RS512", Some(Algorithm::RS512)),
    ("PS256", Some(Algorithm::PS256)),
    ("PS384", Some(Algorithm::PS384)),
    ("PS512", Some(Algorithm::PS512)),
    ("ES256", Some(Algorithm::ES256)),
    ("ES384", Some(Algorithm::ES384)),
    ("EdDSA", Some(Algorithm::EdDSA)),
    ("HS256", Some(Algorithm::HS256)),
    ("HS384", Some(Algorithm::HS384)),
    ("HS512", Some(Algorithm::HS512)),
]);

pub(super) const CLAIM: ParsedString<String> =
    ParsedString { name: "a claim name", pattern: formats::NOT_EMPTY, parse: parse_claim, format: String::clone };

const AUDIENCE: ParsedString<String> =
    ParsedString { name: "a value of `aud`", pattern: formats::NOT_EMPTY, parse: parse_claim, format: String::clone };

const LOCATION: ParsedString<TokenLocation> = ParsedString {
    name: "\"bearer\", \"header:NAME\" or \"cookie:NAME\"",
    pattern: concat!("bearer|(header|cookie):", token!()),
    parse: parse_location,
    format: format_location,
};

/// Reads `identity.user` in its table form: the claim that names the user, and the token
/// verification.
pub(super) fn read(user: &TableReader<'_>) -> Option<(IdentitySource, TokenConfig)> {
    user.constraint(constraints::exactly_one(&["jwt"]));
    let read = user.optional_table("jwt", token_config);
    if read.is_none() {
        let problem = ConfigProblem::new(FaultCode::Missing, "`jwt` is missing");
        let hint = "write { jwt = { keys = \"jwks.json\", algorithms = [\"ES256\"], claim = \"sub\" } }";
        user.context.error(&user.at, problem.hint(hint));
    }
    read.flatten()
}

fn token_config(table: &TableReader<'_>) -> Option<(IdentitySource, TokenConfig)> {
    let path = table.required("keys", &AnyString);
    let algorithms = table.required("algorithms", &ArrayOf { item: ALGORITHM, min_items: 1, repeats: Repeats::Warned });
    let user = table.value_or("claim", &CLAIM, DEFAULT_USER_CLAIM.to_owned());
    let issuer = table.optional("issuer", &AnyString).map(|issuer| issuer.value);
    let audience = formats::list(table, "audience", AUDIENCE, Vec::new());
    let leeway = table.value_or("leeway", &DurationRange(Duration::ZERO..=LEEWAY_MAX), TokenConfig::LEEWAY);
    let location = table.value_or("token", &LOCATION, TokenLocation::default());
    let source = KeySource {
        authorities: table.optional("keys_ca", &AnyString),
        stale: table.located_or("keys_stale", &DurationRange(Duration::ZERO..=KEYS_STALE_MAX), KEYS_STALE),
    };
    let (path, algorithms) = (path?, algorithms?);
    let (values, at) = (algorithms.value, algorithms.at);
    let algorithms: Vec<Algorithm> = values.into_iter().map(|algorithm| algorithm.value).collect();
    let is_secret = |algorithm: &Algorithm| algorithm.family() == AlgorithmFamily::Hmac;
    if algorithms.iter().any(is_secret) && !algorithms.iter().all(is_secret) {
        let problem =
            ConfigProblem::bad_value("HS algorithms (shared secret) and public-key algorithms cannot be combined");
        let hint = "if a public key were used as an HS secret, anyone who knows the public key could sign tokens";
        table.context.error(&at, problem.hint(hint));
        return None;
    }
    // Each item has already been reported.
    if algorithms.is_empty() {
        return None;
    }
    let keys = if path.value.contains("://") {
        source.remote(table, &path, algorithms).map(TokenKeys::Remote)?
    } else {
        source.check_unused(table);
        TokenKeys::Fixed(key_file(table, &path, &algorithms)?)
    };
    Some((IdentitySource::Claim(user), TokenConfig { keys, location, issuer, audience, leeway }))
}

/// The keys that apply to a key set by URL only.
struct KeySource {
    authorities: Option<Located<String>>,
    stale: (Duration, Option<DocumentLocation>),
}

impl KeySource {
    fn check_unused(&self, table: &TableReader<'_>) {
        let set = [self.authorities.as_ref().map(|path| &path.at), self.stale.1.as_ref()];
        for at in set.into_iter().flatten() {
            let problem = ConfigProblem::bad_value("this key applies to a key set by URL only");
            table.context.error(at, problem.hint("remove the key, or write keys = \"https://...\""));
        }
    }

    fn remote(self, table: &TableReader<'_>, url: &Located<String>, algorithms: Vec<Algorithm>) -> Option<KeySetUrl> {
        if let Err(problem) = check_url(&url.value) {
            table.context.error(&url.at, problem);
            return None;
        }
        // Every reader of the set would know the secret.
        if algorithms.iter().any(|algorithm| algorithm.family() == AlgorithmFamily::Hmac) {
            let problem = ConfigProblem::bad_value("a key set by URL cannot have the secrets of HS algorithms");
            table.context.error(&url.at, problem.hint("use a file, or public-key algorithms"));
            return None;
        }
        let authorities = match &self.authorities {
            Some(path) => authorities(table, path)?,
            None => Vec::new(),
        };
        Some(KeySetUrl { url: url.value.clone(), algorithms, authorities, stale: self.stale.0 })
    }
}

/// The certificates of a PEM file, in DER.
fn authorities(table: &TableReader<'_>, path: &Located<String>) -> Option<Vec<Vec<u8>>> {
    let text = read_file(&table.context.environment, &path.value).map_err(|problem| {
        table.context.error(&path.at, problem);
    });
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.ok()?.as_bytes()).collect();
    let certificates = parsed.ok().filter(|certificates| !certificates.is_empty());
    if certificates.is_none() {
        let problem = ConfigProblem::new(FaultCode::File, format!("{} has no certificates", path.value));
        table.context.error(&path.at, problem.hint("expected a PEM file with certificates of authorities"));
    }
    Some(certificates?.iter().map(|certificate| certificate.to_vec()).collect())
}

/// The URL never appears in full in a message: it may contain a password.
fn check_url(text: &str) -> Result<(), ConfigProblem> {
    let problem = |reason: &str| ConfigProblem::bad_value(format!("not the URL of a key set: {reason}"));
    let url = Url::parse(text).map_err(|_| problem("it is not a URL"))?;
    if url.scheme() != "https" {
        let hint = "write \"https://...\": anyone on the way could replace the keys";
        return Err(problem("its scheme is not https").hint(hint));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(problem("it has a user name"));
    }
    if url.fragment().is_some() {
        return Err(problem("it has a fragment"));
    }
    Ok(())
}

/// The key set of a file.
fn key_file(table: &TableReader<'_>, path: &Located<String>, algorithms: &[Algorithm]) -> Option<JwkSet> {
    let text =
        read_file(&table.context.environment, &path.value).map_err(|problem| table.context.error(&path.at, problem));
    let keys = JwkSet::parse(&text.ok()?, algorithms).map_err(|error| {
        let problem = ConfigProblem::new(FaultCode::File, format!("cannot use {}: {error}", path.value));
        table.context.error(&path.at, problem.hint("expected a JWK set (RFC 7517): { \"keys\": [{ \"kty\": ... }] }"));
    });
    let keys = keys.ok()?;
    if keys.has_private() {
        let problem =
            ConfigProblem::new(FaultCode::Risk, "the file contains a private key, which only the issuer should have");
        table.context.warning(&path.at, problem.hint("remove the members `d`, `p`, `q`, `dp`, `dq` and `qi`"));
    }
    Some(keys)
}

fn parse_claim(text: &str) -> Result<String, ConfigProblem> {
    if text.is_empty() { Err(ConfigProblem::bad_value("the string is empty")) } else { Ok(text.to_owned()) }
}

fn parse_location(text: &str) -> Result<TokenLocation, ConfigProblem> {
    match text.split_once(':') {
        None if text == "bearer" => Ok(TokenLocation::Bearer),
        Some(("header", name)) => Ok(TokenLocation::Header(formats::parse_field_name(name)?)),
        Some(("cookie", name)) => Ok(TokenLocation::Cookie(formats::parse_cookie_name(name)?)),
        _ => Err(ConfigProblem::bad_value(format!("`{text}` is not a token location"))
            .hint(format!("write {}", LOCATION.name))),
    }
}

fn format_location(location: &TokenLocation) -> String {
    match location {
        TokenLocation::Bearer => "bearer".to_owned(),
        TokenLocation::Header(name) => format!("header:{name}"),
        TokenLocation::Cookie(name) => format!("cookie:{name}"),
    }
}
