//! What to start at boot: the manifest that xtask puts on the disk.
//!
//! [`parse`] walks the JSON key by key, so an error can say where it is: `guests[1].vcpus: not a number
//! from 1 to 64`. `hv_abi::manifest` describes the format; a key that it does not name is an error, for a
//! misspelt option that does nothing is worse than none. [`GuestConfig`] is also what `create` makes a
//! guest from. Called by `boot`. Calls nothing of ours.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

use crate::bounded;
use hv_abi::machine::{MAX_VCPUS, RAM_LEAST, RAM_LIMIT};
use hv_abi::manifest::{
    APPEND_LIMIT, DEFAULT_MEMORY_MIB, DISK_ID, DISK_PATIENCE_LIMIT, DISKS_LIMIT, FORK_LIMIT, GUESTS_LIMIT,
    IMAGE_DISK_ID, NAME_LIMIT, PRIORITY_MOST, STORED_LIMIT, SWAP_DISK_ID, SWAP_LIMIT, VERSION,
};
use serde_json::{Map, Value};

/// All that the manifest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// True to leave QEMU once the last guest has gone.
    pub batch: bool,
    /// How much memory may be promised, in hundredths of what there is; without it, any.
    pub overcommit: Option<u32>,
    /// Seconds that a disk may be silent before it is given up; 0 is for ever.
    pub disk_patience: Option<u64>,
    /// Exact lengths of images.
    pub images: Vec<Image>,
    /// Disks for stored guests.
    pub stored: Vec<Stored>,
    /// Where pages are swapped to.
    pub swap: Vec<SwapPlace>,
    /// What to start.
    pub guests: Vec<GuestConfig>,
}

/// The exact length of a partition's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The partition's name.
    pub partition: String,
    /// Bytes in it.
    pub bytes: u64,
}

/// A place to swap pages to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapPlace {
    /// What the partition or the host's disk is called.
    pub name: String,
    /// It is a whole disk.
    pub is_disk: bool,
    /// Its priority, if it was given one.
    pub priority: Option<u16>,
}

/// A disk for a stored guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What the host's disk calls itself.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The guest that is stored there goes on at once.
    pub resume: bool,
}

/// Bytes of a stored guest's name at most: that of a clone of clones is longer than a manifest's.
const STORED_NAME: usize = 255;

/// What one guest is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Its name, for people.
    pub name: String,
    /// What it runs.
    pub boot: Boot,
    /// The kernel's command line.
    pub append: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// How many children, forked by itself or them, may live at once; 0 is none.
    pub grant_fork: u32,
    /// Its disks.
    #[serde(deserialize_with = "bounded::list::<_, _, DISKS_LIMIT>")]
    pub disks: Vec<DiskConfig>,
    /// It comes from an image: what it names is another machine's, perhaps.
    #[serde(skip)]
    pub stored: bool,
}

impl GuestConfig {
    /// True if its texts are like those of a manifest, but for its own name: for one that was stored.
    pub fn is_sound(&self) -> bool {
        let boots = [Some(self.boot.image()), self.boot.initrd()].into_iter().flatten();
        let names = boots.chain(self.disks.iter().map(|disk| disk.id.as_str()));
        let plain =
            |name: &str| (1..=NAME_LIMIT).contains(&name.len()) && !name.chars().any(char::is_control);
        self.append.len() <= APPEND_LIMIT && names.into_iter().all(plain)
    }

    /// Makes its name one that can be shown, as short as may be.
    pub fn tidy_name(&mut self) {
        let (mut name, fit) =
            (String::new(), |name: &String, c: char| name.len() + c.len_utf8() <= STORED_NAME);
        for c in self.name.chars().filter(|c| !c.is_control()) {
            if !fit(&name, c) {
                break;
            }
            name.push(c);
        }
        self.name = if name.is_empty() { "stored".to_owned() } else { name };
    }
}

/// One disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// What the host's disk calls itself.
    pub id: String,
    /// What becomes of writes.
    pub writes: Writes,
}

/// What becomes of a guest's writes to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writes {
    /// They go to the host's disk.
    Through,
    /// They are the guest's own and end with it.
    Private,
    /// They are refused.
    Refused,
}

impl Writes {
    /// Each with its word in a manifest.
    const WORDS: [(&str, Self); 3] =
        [("through", Self::Through), ("private", Self::Private), ("refused", Self::Refused)];
}

/// What a guest runs, by the names of partitions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boot {
    /// A kernel or a bare program, in RAM.
    Kernel {
        /// The program.
        image: String,
        /// Its initial RAM disk.
        initrd: Option<String>,
    },
    /// Firmware, in flash bank 0.
    Bios {
        /// The firmware.
        image: String,
    },
}

impl Boot {
    /// The partition of what runs first.
    pub fn image(&self) -> &str {
        match self {
            Self::Kernel { image, .. } | Self::Bios { image } => image,
        }
    }
    /// The partition of the initial RAM disk.
    pub fn initrd(&self) -> Option<&str> {
        match self {
            Self::Kernel { initrd, .. } => initrd.as_deref(),
            Self::Bios { .. } => None,
        }
    }
}

impl Manifest {
    /// The exact length of a partition's contents, if the manifest says.
    pub fn bytes_of(&self, partition: &str) -> Option<u64> {
        self.images.iter().find(|image| image.partition == partition).map(|image| image.bytes)
    }
}

/// What is wrong with a manifest, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The value's place: `guests[1].vcpus`; a line and column if the text is no JSON.
    pub place: String,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "manifest: {}: {}", self.place, self.what)
    }
}

type Parsed<T> = Result<T, ManifestError>;

fn wrong<T>(place: &str, what: impl Into<String>) -> Parsed<T> {
    Err(ManifestError { place: place.to_owned(), what: what.into() })
}

/// Reads the manifest partition's bytes: JSON, then zeros.
pub fn parse(bytes: &[u8]) -> Parsed<Manifest> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let value: Value = match serde_json::from_slice(bytes.get(..end).unwrap_or_default()) {
        Ok(value) => value,
        Err(error) => return wrong("text", error.to_string()),
    };
    let mut top = Object::new("", value)?;
    if let Some(version) = top.number("version", 0, u64::MAX)?
        && version != VERSION
    {
        return wrong("version", format!("{version}; this hypervisor reads {VERSION}"));
    }
    let mut manifest = Manifest { batch: top.flag("batch")?.unwrap_or(false), ..Manifest::default() };
    let percent = top.number("overcommit_percent", 100, u64::from(u32::MAX))?;
    manifest.overcommit = percent.and_then(|percent| u32::try_from(percent).ok());
    manifest.disk_patience = top.number("disk_patience_s", 0, DISK_PATIENCE_LIMIT)?;
    for (place, value) in top.list("images")? {
        let mut object = Object::new(&place, value)?;
        let partition = object.required_name("partition")?;
        let bytes = object.number("bytes", 0, u64::MAX)?;
        let Some(bytes) = bytes else { return wrong(&object.place_of("bytes"), "missing") };
        object.nothing_else()?;
        manifest.images.push(Image { partition, bytes });
    }
    for (place, value) in top.list("stored")? {
        if manifest.stored.len() == STORED_LIMIT {
            return wrong(&place, format!("more than {STORED_LIMIT} disks for stored guests"));
        }
        let mut object = Object::new(&place, value)?;
        let number = object.number("disk", 0, u64::from(u16::MAX))?;
        let Some(number) = number else { return wrong(&object.place_of("disk"), "missing") };
        let (name, resume) = (object.required_name("name")?, object.flag("resume")?.unwrap_or(false));
        if manifest.stored.iter().any(|other| other.name == name) {
            return wrong(&place, format!("a second disk named {name:?}"));
        }
        object.nothing_else()?;
        manifest.stored.push(Stored { id: format!("{IMAGE_DISK_ID}{number}"), name, resume });
    }
    for (place, value) in top.list("swap")? {
        if manifest.swap.len() == SWAP_LIMIT {
            return wrong(&place, format!("more than {SWAP_LIMIT} places to swap to"));
        }
        manifest.swap.push(swap_place(Object::new(&place, value)?)?);
    }
    for (place, value) in top.list("guests")? {
        if manifest.guests.len() == GUESTS_LIMIT {
            return wrong(&place, format!("more than {GUESTS_LIMIT} guests"));
        }
        let config = guest(Object::new(&place, value)?)?;
        if manifest.guests.iter().any(|other| other.name == config.name) {
            return wrong(&place, format!("a second guest named {:?}", config.name));
        }
        manifest.guests.push(config);
    }
    top.nothing_else()?;
    Ok(manifest)
}

/// Reads one guest from the text of its object: what the manifest has in its list, and `create` is given.
pub fn parse_guest(text: &str) -> Parsed<GuestConfig> {
    match serde_json::from_str(text) {
        Ok(value) => guest(Object::new("guest", value)?),
        Err(error) => wrong("text", error.to_string()),
    }
}

fn guest(mut object: Object) -> Parsed<GuestConfig> {
    const MIB: u64 = 1 << 20;
    let name = object.required_name("name")?;
    let (kernel, bios, initrd) = (object.name("kernel")?, object.name("bios")?, object.name("initrd")?);
    let boot = match (kernel, bios) {
        (Some(image), None) => Boot::Kernel { image, initrd },
        (None, Some(_)) if initrd.is_some() => {
            return wrong(&object.place_of("initrd"), "firmware has no use for an initrd");
        }
        (None, Some(image)) => Boot::Bios { image },
        (Some(_), Some(_)) => return wrong(&object.place, "both a kernel and a bios"),
        (None, None) => return wrong(&object.place, "neither a kernel nor a bios"),
    };
    let append = object.text("append", APPEND_LIMIT)?.unwrap_or_default();
    let mib = object.number("memory_mib", RAM_LEAST / MIB, RAM_LIMIT / MIB)?;
    let vcpus = object.number("vcpus", 1, MAX_VCPUS as u64)?.unwrap_or(1);
    let grant_fork = object.number("grant_fork", 0, u64::from(FORK_LIMIT))?.unwrap_or(0);
    let mut disks = Vec::new();
    for (place, value) in object.list("disks")? {
        if disks.len() == DISKS_LIMIT {
            return wrong(&place, format!("more than {DISKS_LIMIT} disks"));
        }
        disks.push(disk(Object::new(&place, value)?)?);
    }
    object.nothing_else()?;
    Ok(GuestConfig {
        name,
        boot,
        append,
        memory: mib.unwrap_or(DEFAULT_MEMORY_MIB) * MIB,
        // At most MAX_VCPUS, which is a usize.
        vcpus: usize::try_from(vcpus).unwrap_or(MAX_VCPUS),
        // At most FORK_LIMIT, which is a u32.
        grant_fork: u32::try_from(grant_fork).unwrap_or(0),
        disks,
        stored: false,
    })
}

fn swap_place(mut object: Object) -> Parsed<SwapPlace> {
    let (partition, number) = (object.name("partition")?, object.number("disk", 0, u64::from(u16::MAX))?);
    let priority = object.number("priority", 0, PRIORITY_MOST)?.and_then(|number| u16::try_from(number).ok());
    object.nothing_else()?;
    match (partition, number) {
        (Some(name), None) => Ok(SwapPlace { name, is_disk: false, priority }),
        (None, Some(number)) => {
            Ok(SwapPlace { name: format!("{SWAP_DISK_ID}{number}"), is_disk: true, priority })
        }
        (Some(_), Some(_)) => wrong(&object.place, "both a partition and a disk"),
        (None, None) => wrong(&object.place, "neither a partition nor a disk"),
    }
}

fn disk(mut object: Object) -> Parsed<DiskConfig> {
    let number = object.number("disk", 0, u64::from(u16::MAX))?;
    let Some(number) = number else { return wrong(&object.place_of("disk"), "missing") };
    let word = object.required_name("writes")?;
    let Some((_, writes)) = Writes::WORDS.into_iter().find(|(known, _)| *known == word) else {
        return wrong(&object.place_of("writes"), "not through, private or refused");
    };
    object.nothing_else()?;
    Ok(DiskConfig { id: format!("{DISK_ID}{number}"), writes })
}

/// A JSON object and its place; each key is taken out when it is read.
struct Object {
    place: String,
    map: Map<String, Value>,
}

impl Object {
    fn new(place: &str, value: Value) -> Parsed<Self> {
        match value {
            Value::Object(map) => Ok(Self { place: place.to_owned(), map }),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                wrong(if place.is_empty() { "text" } else { place }, "not an object")
            }
        }
    }

    fn place_of(&self, key: &str) -> String {
        if self.place.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place) }
    }

    /// The key's value; `null` counts as left out.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    fn flag(&mut self, key: &str) -> Parsed<Option<bool>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => wrong(&self.place_of(key), "not true or false"),
        }
    }

    fn number(&mut self, key: &str, least: u64, most: u64) -> Parsed<Option<u64>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_u64().filter(|number| (least..=most).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => wrong(&self.place_of(key), format!("not a number from {least} to {most}")),
        }
    }

    fn text(&mut self, key: &str, limit: usize) -> Parsed<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.contains('\0') => {
                wrong(&self.place_of(key), "has a zero byte in it")
            }
            Some(Value::String(text)) if text.len() > limit => {
                wrong(&self.place_of(key), format!("{} bytes; {limit} fit", text.len()))
            }
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => wrong(&self.place_of(key), "not a text"),
        }
    }

    fn name(&mut self, key: &str) -> Parsed<Option<String>> {
        match self.text(key, NAME_LIMIT)? {
            Some(name) if name.is_empty() => wrong(&self.place_of(key), "empty"),
            name => Ok(name),
        }
    }

    fn required_name(&mut self, key: &str) -> Parsed<String> {
        match self.name(key)? {
            Some(name) => Ok(name),
            None => wrong(&self.place_of(key), "missing"),
        }
    }

    fn list(&mut self, key: &str) -> Parsed<Vec<(String, Value)>> {
        let place = self.place_of(key);
        match self.take(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => {
                let number = |(index, value)| (format!("{place}[{index}]"), value);
                Ok(values.into_iter().enumerate().map(number).collect())
            }
            Some(_) => wrong(&place, "not a list"),
        }
    }

    fn nothing_else(&self) -> Parsed<()> {
        match self.map.keys().next() {
            Some(key) => wrong(&self.place_of(key), "unknown key"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(text: &str) -> String {
        parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_full_manifest_is_read_and_zeros_behind_it_are_not() {
        let mut bytes = br#"{"version": 1, "batch": true,
            "images": [{"partition": "linux", "bytes": 31461376}],
            "stored": [{"disk": 1, "name": "golden", "resume": true}],
            "swap": [{"partition": "swap", "priority": 5}, {"disk": 3}],
            "guests": [
                {"name": "one", "kernel": "linux", "initrd": "root", "append": "a=\"b\\c\"",
                 "memory_mib": 512, "vcpus": 4, "disks": [{"disk": 2, "writes": "private"}]},
                {"name": "boot", "bios": "u-boot"}]}"#
            .to_vec();
        bytes.resize(4096, 0);
        let manifest = parse(&bytes).unwrap();
        assert!(manifest.batch);
        assert_eq!(manifest.bytes_of("linux"), Some(31_461_376));
        assert_eq!(manifest.bytes_of("root"), None);
        let golden = Stored { id: "stored-guest-1".to_owned(), name: "golden".to_owned(), resume: true };
        assert_eq!(manifest.stored, [golden]);
        let swap = |name: &str, is_disk, priority| SwapPlace { name: name.to_owned(), is_disk, priority };
        assert_eq!(manifest.swap, [swap("swap", false, Some(5)), swap("swap-disk-3", true, None)]);
        let [one, boot] = manifest.guests.as_slice() else { panic!("two guests") };
        assert_eq!((one.boot.image(), one.boot.initrd()), ("linux", Some("root")));
        assert_eq!((one.append.as_str(), one.memory, one.vcpus), ("a=\"b\\c\"", 512 << 20, 4));
        let private = DiskConfig { id: "guest-disk-2".to_owned(), writes: Writes::Private };
        assert_eq!((one.disks.as_slice(), boot.disks.len()), ([private].as_slice(), 0));
        assert_eq!(boot.boot, Boot::Bios { image: "u-boot".to_owned() });
        assert_eq!((boot.memory, boot.vcpus), (DEFAULT_MEMORY_MIB << 20, 1));
    }

    #[test]
    fn an_error_says_what_is_wrong_and_where() {
        let guest = |rest: &str| complaint(&format!(r#"{{"guests": [{{"name": "g"{rest}}}]}}"#));
        assert!(complaint("{").contains("line 1"));
        assert_eq!(complaint("[]"), "manifest: text: not an object");
        assert_eq!(complaint(r#"{"version": 2}"#), "manifest: version: 2; this hypervisor reads 1");
        let swap = |text: &str| complaint(&format!(r#"{{"swap": [{{{text}}}]}}"#));
        assert_eq!(swap(""), "manifest: swap[0]: neither a partition nor a disk");
        let priority = swap(r#""disk": 1, "priority": 32768"#);
        assert_eq!(priority, "manifest: swap[0].priority: not a number from 0 to 32767");
        assert_eq!(complaint(r#"{"batch": 1}"#), "manifest: batch: not true or false");
        assert_eq!(complaint(r#"{"guests": {}}"#), "manifest: guests: not a list");
        assert_eq!(complaint(r#"{"guests": [{}]}"#), "manifest: guests[0].name: missing");
        assert_eq!(complaint(r#"{"images": [{"partition": "a"}]}"#), "manifest: images[0].bytes: missing");
        assert_eq!(guest(""), "manifest: guests[0]: neither a kernel nor a bios");
        assert_eq!(guest(r#","kernel":"k","bios":"b""#), "manifest: guests[0]: both a kernel and a bios");
        assert_eq!(guest(r#","kernel":"""#), "manifest: guests[0].kernel: empty");
        assert_eq!(guest(r#","kernel":7"#), "manifest: guests[0].kernel: not a text");
        let vcpus = guest(r#","kernel":"k","vcpus":65"#);
        assert_eq!(vcpus, "manifest: guests[0].vcpus: not a number from 1 to 64");
        assert_eq!(guest(r#","kernel":"k","vcpu":1"#), "manifest: guests[0].vcpu: unknown key");
        assert!(guest(r#","kernel":"k","memory_mib":1"#).contains("memory_mib: not a number from 2"));
        assert!(guest(r#","kernel":"k","append":"a\u0000""#).contains("zero byte"));
        let disk = |text: &str| guest(&format!(r#","kernel":"k","disks":[{{{text}}}]"#));
        assert_eq!(disk(r#""writes":"private""#), "manifest: guests[0].disks[0].disk: missing");
        let writes = disk(r#""disk":1,"writes":"shared""#);
        assert_eq!(writes, "manifest: guests[0].disks[0].writes: not through, private or refused");
    }

    #[test]
    fn two_guests_of_one_name_are_refused() {
        let text = r#"{"guests": [{"name": "g", "kernel": "k"}, {"name": "g", "kernel": "k"}]}"#;
        assert_eq!(complaint(text), "manifest: guests[1]: a second guest named \"g\"");
    }

    #[test]
    fn one_guest_is_read_alone_too() {
        assert_eq!(parse_guest(r#"{"name": "g", "kernel": "k"}"#).unwrap().vcpus, 1);
        assert_eq!(parse_guest(r#"{"name": "g"}"#).unwrap_err().place, "guest");
    }
}
