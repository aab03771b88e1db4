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
    continent: Option<CountryCode>,
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
