//! Countries of addresses, from a database file in MaxMind's format, and the regions that they
//! belong to.
//!
//! The file is read when the configuration is loaded, once for each version of it. A country comes
//! from the address alone, so a client behind a proxy in another country counts as there.

use std::fmt;
use std::fs::{self, Metadata};
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use maxminddb::{MaxMindDbError, Reader};
use serde::Deserialize;
use shard::Region;

/// Largest database; the largest published ones, of cities, have less than 150 MiB.
const DATABASE_BYTES_MAX: u64 = 256 << 20;

/// A country code of two capital letters (ISO 3166-1 alpha-2).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct CountryCode([u8; 2]);

impl CountryCode {
    /// `None` if the text is not two capital letters.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let code: [u8; 2] = text.as_bytes().try_into().ok()?;
        code.iter().all(u8::is_ascii_uppercase).then_some(CountryCode(code))
    }

    /// The region with this name in lower case.
    pub(super) fn region(self) -> Option<Region> {
        Region::new(&self.as_str().to_ascii_lowercase()).ok()
    }

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a code is ASCII")
    }
}

impl fmt::Debug for CountryCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A country or a continent of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GeoArea {
    Country(CountryCode),
    /// By the two letters of MaxMind: AF, AN, AS, EU, NA, OC, SA.
    Continent(CountryCode),
}

/// Configuration of GeoIP (`[identity.geoip]`).
#[derive(Clone, Debug, PartialEq)]
pub struct GeoIpConfig {
    pub(crate) database: Arc<GeoDatabase>,
    /// The region of each area.
    pub(crate) regions: Vec<(GeoArea, Region)>,
}

/// The country of an address, and its continent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GeoPlace {
    pub(super) country: Option<CountryCode>,
    pub(super) continent: Option<CountryCode>,
}

impl GeoIpConfig {
    pub(super) fn place(&self, ip: IpAddr) -> GeoPlace {
        self.database.place(ip)
    }

    /// The region of a place: that of its country, else that of its continent.
    pub(super) fn region(&self, place: &GeoPlace) -> Option<Region> {
        let areas = [place.country.map(GeoArea::Country), place.continent.map(GeoArea::Continent)];
        let region = |area: GeoArea| self.regions.iter().find(|(known, _)| *known == area).map(|(_, region)| *region);
        areas.into_iter().flatten().find_map(region)
    }
}

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GeoDatabaseError {
    #[error("{0}")]
    Read(#[from] std::io::Error),
    #[error("it is not a regular file")]
    Kind,
    #[error("it is larger than 256 MiB")]
    Size,
    #[error("it is not a database in MaxMind's format: {0}")]
    Format(#[from] MaxMindDbError),
}

/// A database in memory.
pub(crate) struct GeoDatabase {
    path: PathBuf,
    version: FileVersion,
    reader: Reader<Vec<u8>>,
}

/// Device, inode, length and time of modification of a file.
type FileVersion = (u64, u64, u64, Option<SystemTime>);

/// The part of a record that is read. Absent parts and records of another shape give no country.
#[derive(Deserialize)]
struct CountryRecord<'a> {
    #[serde(borrow)]
    country: Option<CountryName<'a>>,
    #[serde(borrow)]
    registered_country: Option<CountryName<'a>>,
    #[serde(borrow)]
    continent: Option<ContinentName<'a>>,
}

#[derive(Deserialize)]
struct CountryName<'a> {
    iso_code: Option<&'a str>,
}

#[derive(Deserialize)]
struct ContinentName<'a> {
    code: Option<&'a str>,
}

impl GeoDatabase {
    /// Reads a database, or returns the one that was read from the same version of the file and is
    /// still in use: a reload for another reason does not read it again.
    pub(crate) fn open(path: &Path) -> Result<Arc<GeoDatabase>, GeoDatabaseError> {
        static OPEN: LazyLock<Mutex<Vec<Weak<GeoDatabase>>>> = LazyLock::new(Mutex::default);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|database| database.strong_count() > 0);
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(GeoDatabaseError::Kind);
        }
        if metadata.len() > DATABASE_BYTES_MAX {
            return Err(GeoDatabaseError::Size);
        }
        let version = version(&metadata);
        let same = |database: &Arc<GeoDatabase>| database.path == path && database.version == version;
        if let Some(database) = open.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(database);
        }
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(DATABASE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > DATABASE_BYTES_MAX {
            return Err(GeoDatabaseError::Size);
        }
        let reader = Reader::from_source(bytes)?;
        // Otherwise a damaged file would give no country for some addresses.
        reader.verify()?;
        let database = Arc::new(GeoDatabase { path: path.to_owned(), version, reader });
        open.push(Arc::downgrade(&database));
        Ok(database)
    }

    /// Whether the database is of a kind that has countries, by its own description.
    pub(crate) fn has_countries(&self) -> bool {
        let kind = self.kind().to_ascii_lowercase();
        ["country", "city", "enterprise", "location"].iter().any(|word| kind.contains(word))
    }

    /// Such as `GeoLite2-Country`.
    pub(crate) fn kind(&self) -> &str {
        &self.reader.metadata().database_type
    }

    fn place(&self, ip: IpAddr) -> GeoPlace {
        // A database of IPv4 alone fails for IPv6.
        let record = self.reader.lookup(ip).and_then(|found| found.decode::<CountryRecord<'_>>());
        let Ok(Some(record)) = record else { return GeoPlace::default() };
        let code = |name: Option<CountryName<'_>>| CountryCode::new(name?.iso_code?);
        GeoPlace {
            country: code(record.country).or_else(|| code(record.registered_country)),
            continent: record.continent.and_then(|continent| CountryCode::new(continent.code?)),
        }
    }
}

fn version(metadata: &Metadata) -> FileVersion {
    (metadata.dev(), metadata.ino(), metadata.len(), metadata.modified().ok())
}

impl PartialEq for GeoDatabase {
    fn eq(&self, other: &GeoDatabase) -> bool {
        (&self.path, self.version) == (&other.path, other.version)
    }
}

impl fmt::Debug for GeoDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmdb::database;
    use super::*;

    const NETWORKS: [(&str, &str, &str); 6] = [
        ("192.0.2.0/24", "DE", "EU"),
        ("198.51.100.0/25", "US", "NA"),
        ("203.0.113.7/32", "", "AS"),
        ("203.0.113.8/32", "deutschland", "europe"),
        ("2001:db8::/32", "FR", "EU"),
        ("10.0.0.0/8", "", ""),
    ];

    fn write(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tidegate-geoip-{}-{name}", std::process::id()));
        fs::write(&path, bytes).expect("the temporary directory is writable");
        path
    }

    fn text(code: Option<CountryCode>) -> String {
        code.map_or_else(String::new, |code| code.as_str().to_owned())
    }

    #[test]
    fn countries_and_continents_are_found_by_address() {
        let path = write("found", &database("GeoLite2-Country", &NETWORKS));
        let database = GeoDatabase::open(&path).expect("a usable database");
        assert!(database.has_countries());
        for (address, country, continent) in [
            ("192.0.2.255", "DE", "EU"),
            ("192.0.3.0", "", ""),
            ("198.51.100.127", "US", "NA"),
            ("198.51.100.128", "", ""),
            ("203.0.113.7", "", "AS"),
            ("203.0.113.8", "", ""),
            ("10.1.2.3", "", ""),
            ("2001:db8:ffff::1", "FR", "EU"),
            ("2001:db9::1", "", ""),
        ] {
            let place = database.place(address.parse().expect("an address"));
            assert_eq!(
                (text(place.country), text(place.continent)),
                (country.to_owned(), continent.to_owned()),
                "{address}"
            );
        }
        // The same version of the file is read once.
        assert!(Arc::ptr_eq(&database, &GeoDatabase::open(&path).expect("a usable database")));
        let code = |code: &str| CountryCode::new(code).expect("a code");
        let regions = [(GeoArea::Continent(code("EU")), "north"), (GeoArea::Country(code("FR")), "south")];
        let regions = regions.map(|(area, name)| (area, Region::new(name).expect("a region"))).to_vec();
        let config = GeoIpConfig { database, regions };
        let region = |address: &str| config.region(&config.place(address.parse().expect("an address")));
        assert_eq!(region("192.0.2.1").as_ref().map(Region::as_str), Some("north"));
        assert_eq!(region("2001:db8::1").as_ref().map(Region::as_str), Some("south"), "its country comes first");
        assert_eq!((region("198.51.100.1"), region("8.8.8.8")), (None, None));
        fs::remove_file(path).expect("the file exists");
    }

    #[test]
    fn damaged_and_oversize_files_are_refused() {
        let whole = database("GeoLite2-Country", &NETWORKS);
        let open = |name: &str, bytes: &[u8]| {
            let path = write(name, bytes);
            let opened = GeoDatabase::open(&path).map(drop);
            fs::remove_file(path).expect("the file exists");
            opened
        };
        assert!(open("whole", &whole).is_ok());
        for length in 0..whole.len() {
            assert!(open("short", &whole[..length]).is_err(), "the first {length} bytes");
        }
        // A record of the tree that points behind the data.
        let mut damaged = whole;
        damaged[..3].copy_from_slice(&[0xff; 3]);
        assert!(open("damaged", &damaged).is_err());
        assert!(matches!(GeoDatabase::open(&std::env::temp_dir()), Err(GeoDatabaseError::Kind)));
        let large = write("large", b"");
        fs::File::options()
            .write(true)
            .open(&large)
            .and_then(|file| file.set_len(DATABASE_BYTES_MAX + 1))
            .expect("a file");
        assert!(matches!(GeoDatabase::open(&large), Err(GeoDatabaseError::Size)));
        fs::remove_file(large).expect("the file exists");
    }
}
