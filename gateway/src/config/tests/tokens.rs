//! `identity.user` and `identity.tier` as tables: token verification and its key file.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use super::super::{Config, ConfigReport, DocumentFormat};
use super::{MINIMAL, lines, parse_in};
use crate::identify::IdentitySource;
use crate::identify::issuer::{Issuer, set};
use crate::identify::tokens::{Algorithm, TokenConfig, TokenLocation};

/// A directory with JWK sets `ec.json`, `secret.json`, `both.json` and `private.json`, and with
/// invalid files.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = std::env::temp_dir().join(format!("tidegate-keys-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let (ec, secret) = (Issuer::new(Algorithm::ES256, "pub"), Issuer::new(Algorithm::HS256, "sec"));
    let mut private = Issuer::new(Algorithm::ES256, "mine");
    private.jwk["d"] = "AAAA".into();
    for (name, text) in [
        ("ec.json", set(&[&ec])),
        ("secret.json", set(&[&secret])),
        ("both.json", set(&[&ec, &secret])),
        ("private.json", set(&[&private])),
        ("empty.json", set(&[])),
        ("ec.pem", "-----BEGIN PUBLIC KEY-----".to_owned()),
    ] {
        std::fs::write(directory.join(name), text).expect("the temporary directory is writable");
    }
    directory
});

fn parse(identity: &str) -> Result<(Config, ConfigReport), ConfigReport> {
    parse_in(&DIRECTORY, &format!("{MINIMAL}[identity]\n{identity}\n"), DocumentFormat::Toml)
}

/// Faults and warnings of `[identity]` with these lines; the first is line 10 of the document.
fn faults(identity: &str) -> Vec<String> {
    lines(&match parse(identity) {
        Ok((_, warnings)) => warnings,
        Err(report) => report,
    })
}

#[test]
fn unusable_token_configurations_are_errors() {
    let form = "expected a JWK set (RFC 7517): { \"keys\": [{ \"kty\": ... }] }";
    for (identity, want) in [
        (
            "user = {}",
            "10:8 identity.user: `jwt` is missing (write { jwt = { keys = \"jwks.json\", algorithms = [\"ES256\"], claim = \"sub\" } })",
        ),
        (
            "user = { jwt = { keys = \"ec.json\" } }",
            "10:16 identity.user.jwt.algorithms: `algorithms` is missing (expected a non-empty array; each item: one of",
        ),
        (
            "user = { jwt = { algorithms = [\"ES256\"] } }",
            "10:16 identity.user.jwt.keys: `keys` is missing (expected a string)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], algorithm = \"none\" } }",
            "10:60 identity.user.jwt.algorithm: unknown key `algorithm` (did you mean `algorithms`?)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"] }, api_key = 1 }",
            "10:62 identity.user.api_key: unknown key `api_key`",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"none\"] } }",
            "10:50 identity.user.jwt.algorithms[0]: unknown value \"none\"",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [] } }",
            "10:49 identity.user.jwt.algorithms: the array needs at least one item",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"HS256\", \"ES256\"] } }",
            "10:51 identity.user.jwt.algorithms: HS algorithms (shared secret) and public-key algorithms cannot be combined (if a \
             public key were used as an HS secret, anyone who knows the public key could sign tokens)",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use both.json: key `sec` is a secret (`oct`), but the algorithms are for public keys",
        ),
        (
            "user = { jwt = { keys = \"both.json\", algorithms = [\"HS256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use both.json: key `pub` is a public key, but the algorithms are for secrets (`oct`)",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"RS256\"] } }",
            &format!(
                "10:25 identity.user.jwt.keys: cannot use ec.json: the set has no key for the allowed algorithms ({form})"
            ),
        ),
        (
            "user = { jwt = { keys = \"empty.json\", algorithms = [\"RS256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use empty.json: the set has no key for the allowed algorithms",
        ),
        (
            "user = { jwt = { keys = \"ec.pem\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot use ec.pem: not a JWK set: ",
        ),
        (
            "user = { jwt = { keys = \"absent.json\", algorithms = [\"ES256\"] } }",
            "10:25 identity.user.jwt.keys: cannot read ",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], claim = \"\" } }",
            "10:68 identity.user.jwt.claim: the string is empty",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], leeway = \"1h\" } }",
            "10:69 identity.user.jwt.leeway: out of range: expected a duration, 0s to 5m",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], token = \"query:t\" } }",
            "10:68 identity.user.jwt.token: `query:t` is not a token location (write \"bearer\", \"header:NAME\" or \"cookie:NAME\")",
        ),
        (
            "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\"], token = \"cookie:a b\" } }",
            "10:68 identity.user.jwt.token: `a b` is not a cookie name",
        ),
        (
            "tier = { jwt_claim = \"tier\" }",
            "10:22 identity.tier.jwt_claim: there is no token to read the claim from (set `identity.user = { jwt = { ... } }`)",
        ),
        (
            "trusted_proxies = [\"::1\"]\nuser = \"header:x-u\"\ntier = { jwt_claim = \"tier\" }",
            "12:22 identity.tier.jwt_claim: there is no token to read the claim from",
        ),
        ("tier = { claim = \"tier\" }", "10:8 identity.tier.jwt_claim: `jwt_claim` is missing (expected a claim name)"),
    ] {
        let found = faults(identity);
        assert!(found.iter().any(|fault| fault.starts_with(want)), "{found:#?}\n{want}");
        assert!(parse(identity).is_err(), "{identity}");
    }
}

#[test]
fn private_key_in_the_key_file_is_a_warning() {
    let found = faults("user = { jwt = { keys = \"private.json\", algorithms = [\"ES256\"] } }");
    assert_eq!(
        found,
        [
            "10:25 identity.user.jwt.keys: the file contains a private key, which only the issuer should have (remove the members \
             `d`, `p`, `q`, `dp`, `dq` and `qi`)"
        ]
    );
}

#[test]
fn token_keys_have_defaults_and_effect() {
    let (config, warnings) = parse(
        "user = { jwt = { keys = \"ec.json\", algorithms = [\"ES256\", \"EdDSA\"] } }\ntier = { jwt_claim = \"https://id.test/tier\" }",
    )
    .unwrap_or_else(|report| panic!("{report}"));
    // Tokens are accepted from any peer, so that no trusted proxies are needed.
    assert!(warnings.is_empty(), "{warnings}");
    assert_eq!(config.identify.user, Some(IdentitySource::Claim("sub".to_owned())));
    assert_eq!(config.identify.user_class, Some(IdentitySource::Claim("https://id.test/tier".to_owned())));
    assert!(
        config.files.iter().any(|file| file.path == DIRECTORY.join("ec.json")),
        "a change of the key file triggers a reload"
    );
    assert_eq!(&*config.http.dropped_trailers, ["authorization"]);
    let tokens = config.identify.tokens.expect("tokens are configured");
    assert_eq!(tokens.keys.algorithms(), [Algorithm::ES256, Algorithm::EdDSA]);
    let TokenConfig { location, issuer, audience, leeway, .. } = tokens;
    assert_eq!(
        (location, issuer, audience, leeway),
        (TokenLocation::Bearer, None, Vec::new(), Duration::from_secs(30))
    );
    let (config, _) = parse(
        "[identity.user.jwt]\nkeys = \"secret.json\"\nalgorithms = [\"HS256\"]\nclaim = \"uid\"\nissuer = \"https://id.test\"\n\
         audience = [\"shop\"]\nleeway = \"0s\"\ntoken = \"header:X-Token\"",
    )
    .unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(config.identify.user, Some(IdentitySource::Claim("uid".to_owned())));
    assert_eq!(&*config.http.dropped_trailers, ["x-token"]);
    let TokenConfig { location, issuer, audience, leeway, .. } = config.identify.tokens.expect("tokens are configured");
    assert_eq!((location, issuer.as_deref()), (TokenLocation::Header("x-token".to_owned()), Some("https://id.test")));
    assert_eq!((audience, leeway), (vec!["shop".to_owned()], Duration::ZERO));
}
