//! Disks for stored guests: which there are for a run, and what is on one.
//!
//! The reader here shares the format's numbers with the hypervisor (`hv_abi::image`) and nothing else, so that what it
//! says of an image is a second opinion. Used by `run`, by `cargo xtask image`, and by tests.

use anyhow::{Context, Result, bail, ensure};
use hv_abi::image::{Header, NoHeader, PAGE, SLOTS, Sum, mark};
use hv_abi::manifest::{NAME_LIMIT, STORED_LIMIT};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What becomes of a disk for a stored guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// The guest there goes on; another can be stored.
    Resume,
    /// The guest there goes on; nothing is written.
    ResumeOnly,
    /// It is there for the monitor.
    Attach,
    /// It is made, empty.
    Make,
}

/// `--image FILE[,ro|attach|new]`, `--image nbd:EXPORT` or `--image rbd:POOL/IMAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageDisk {
    /// The file, or the export or Ceph image as QEMU names it.
    pub(crate) file: PathBuf,
    /// What the monitor calls it.
    pub(crate) name: String,
    /// What becomes of it.
    pub(crate) how: Use,
}

impl ImageDisk {
    /// True when the guest that is stored there goes on at once.
    pub(crate) fn resumes(&self) -> bool {
        matches!(self.how, Use::Resume | Use::ResumeOnly)
    }

    /// Makes the file if that is wanted: room for two guests of so many MiB each; the file takes only what is written.
    pub(crate) fn provide(&self, mib: u64) -> Result<()> {
        // Flash, tables and state, and some slack for a guest that is a little larger.
        const MORE_MIB: u64 = 192;
        if self.how == Use::Make {
            let file = OpenOptions::new().write(true).create_new(true).open(&self.file);
            let file = file.with_context(|| format!("making {}", self.file.display()))?;
            file.set_len((2 * (mib + MORE_MIB) + 1) << 20)?;
        }
        Ok(())
    }
}

/// Reads `FILE[,ro|attach|new]`, or what QEMU reads a block device from over a network, which is read-only here:
/// `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH`, or `rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:OPTION=VALUE...]`.
pub(crate) fn image(text: &str) -> Result<ImageDisk, String> {
    if let Some(rest) = text.strip_prefix("nbd:") {
        if !rest.split_once(':').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty()) {
            return Err("an NBD export is written nbd:HOST:PORT, with :exportname=NAME behind it if it has one, or nbd:unix:PATH".to_owned());
        }
        let stem = rest.rsplit_once("exportname=").map_or(rest, |(_, name)| name);
        return Ok(ImageDisk { file: text.into(), name: name_of(Path::new(stem)), how: Use::ResumeOnly });
    }
    if let Some(rest) = text.strip_prefix("rbd:") {
        let words = "an image of Ceph's is written rbd:POOL/IMAGE, with @SNAPSHOT behind it if it is one, and then :OPTION=VALUE as QEMU takes them";
        // QEMU has a backslash before a character that would end a part.
        let (place, options) = split_unescaped(rest, ':');
        if !options.is_none_or(|options| options.contains('=')) {
            return Err(words.to_owned());
        }
        let (place, snapshot) = split_unescaped(place, '@');
        let parts: Vec<&str> = place.split('/').collect();
        let (2..=3, Some(image)) = (parts.len(), parts.last()) else { return Err(words.to_owned()) };
        if parts.iter().any(|part| part.is_empty()) || snapshot == Some("") {
            return Err(words.to_owned());
        }
        return Ok(ImageDisk { file: text.into(), name: plain(image), how: Use::ResumeOnly });
    }
    let (file, how) = match text.rsplit_once(',') {
        Some((file, "ro")) => (file, Use::ResumeOnly),
        Some((file, "attach")) => (file, Use::Attach),
        Some((file, "new")) => (file, Use::Make),
        // A comma may be part of the name.
        Some((_, other)) if !Path::new(text).exists() => {
            return Err(format!("'{other}' after the comma; it is ro, attach or new"));
        }
        Some(_) | None => (text, Use::Resume),
    };
    let path = PathBuf::from(file);
    match (how, path.exists()) {
        (Use::Make, true) => Err("it is there already; without ,new it is used as it is".to_owned()),
        (Use::Resume | Use::ResumeOnly | Use::Attach, false) => {
            Err(format!("there is no such file; {file},new makes one for the monitor's `save`"))
        }
        (_, _) if path.is_dir() => Err("that is a folder".to_owned()),
        (Use::Make, false) | (Use::Resume | Use::ResumeOnly | Use::Attach, true) => {
            Ok(ImageDisk { name: name_of(&path), file: path, how })
        }
    }
}

/// What is before a character and behind it, where no backslash is before that.
fn split_unescaped(text: &str, at: char) -> (&str, Option<&str>) {
    let mut escaped = false;
    for (place, c) in text.char_indices() {
        if c == at && !escaped {
            return (&text[..place], Some(&text[place + c.len_utf8()..]));
        }
        escaped = c == '\\' && !escaped;
    }
    (text, None)
}

/// The last part of a path without its extension, as far as a name may be long.
fn name_of(path: &Path) -> String {
    plain(&path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default())
}

/// A name that the monitor takes.
fn plain(stem: &str) -> String {
    let mut name: String =
        stem.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    while name.len() > NAME_LIMIT {
        name.pop();
    }
    if name.is_empty() { "image".to_owned() } else { name }
}

/// Refuses disks that one machine cannot have together.
pub(crate) fn check_images(images: &[ImageDisk]) -> Result<()> {
    ensure!(images.len() <= STORED_LIMIT, "{} times --image; {STORED_LIMIT} fit", images.len());
    for (number, image) in images.iter().enumerate() {
        let twice = images[..number].iter().any(|other| other.name == image.name);
        ensure!(!twice, "--image {}: a second one called '{}'", image.file.display(), image.name);
    }
    Ok(())
}

/// A stored guest as it is on a disk, all of it looked at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    /// The header that holds.
    pub(crate) header: Header,
    /// What it says for people.
    pub(crate) text: Value,
}

/// What is stored in a file, every page of it compared with its sum; `None` when nothing is.
pub(crate) fn look(file: &File) -> Result<Option<Stored>> {
    look_with(&|number| {
        let mut bytes = [0; PAGE];
        let read = file.read_exact_at(&mut bytes, number * PAGE as u64);
        read.with_context(|| format!("reading page {number}"))?;
        Ok(bytes)
    })
}

/// The same of whatever gives pages by their numbers.
pub(crate) fn look_with(page: &dyn Fn(u64) -> Result<[u8; PAGE]>) -> Result<Option<Stored>> {
    let (mut newest, mut damaged) = (None::<Stored>, None);
    for slot in 0..SLOTS {
        match Header::decode(slot, &page(slot as u64)?) {
            Ok((header, text)) => {
                let text = serde_json::from_slice(text).context("a header's description is no JSON")?;
                if newest.as_ref().is_none_or(|other| header.generation > other.header.generation) {
                    newest = Some(Stored { header, text });
                }
            }
            Err(NoHeader::Empty) => {}
            Err(NoHeader::Damaged) => damaged = Some(slot),
            Err(NoHeader::Version(version)) => bail!("it is in version {version} of the format"),
            Err(NoHeader::Foreign) => bail!("it holds no stored guest"),
        }
    }
    let stored = match (newest, damaged) {
        (Some(stored), _) => stored,
        (None, Some(slot)) => bail!("header {slot} is damaged"),
        (None, None) => return Ok(None),
    };
    let header = stored.header;
    let table_at = header.start() + header.pages;
    let (mut table, mut sum) = (Vec::new(), Sum::new(header.key));
    for number in 0..header.table_pages() {
        let bytes = page(table_at + number)?;
        sum.add(&bytes);
        table.extend(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)));
    }
    ensure!(sum.finish() == header.table_sum, "its table of sums is damaged");
    let mut sum = Sum::new(header.key);
    for number in 0..header.state.div_ceil(PAGE as u64) {
        sum.add(&page(table_at + header.table_pages() + number)?);
    }
    ensure!(sum.finish() == header.state_sum, "its state is damaged");
    let mut found = 0;
    for (number, expected) in (0..header.pages).zip(table).filter(|(_, expected)| *expected != 0) {
        let bytes = page(header.start() + number)?;
        let place = (header.start() + number) * PAGE as u64;
        ensure!(
            mark(&bytes, header.page_key(number)) == expected,
            "page {number} is damaged, at byte {place:#x}"
        );
        found += 1;
    }
    ensure!(found == header.stored, "{found} pages are stored, and there should be {}", header.stored);
    Ok(Some(stored))
}

/// The guest that is stored in a file, all of it whole.
pub(crate) fn whole(path: &Path) -> Result<Stored> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    look(&file)?.with_context(|| format!("nothing is stored in {}", path.display()))
}

/// `cargo xtask image FILE`: says what is stored there, and whether it is whole.
pub(crate) fn show(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    match look(&file).with_context(|| path.display().to_string())? {
        None => println!("{}: nothing is stored there", path.display()),
        Some(Stored { header, text }) => {
            println!("{}: every page is as it was stored", path.display());
            println!("generation    {}", header.generation);
            println!("pages         {} of {} are not zeros", header.stored, header.pages);
            for (key, value) in text.as_object().into_iter().flatten() {
                println!("{key:<13} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_file_that_is_there_or_is_to_be_made_or_an_export() {
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let how = |text: &str| image(text).map(|image| (image.name, image.how));
        assert_eq!(how(here), Ok(("Cargo".to_owned(), Use::Resume)));
        assert_eq!(how(&format!("{here},ro")), Ok(("Cargo".to_owned(), Use::ResumeOnly)));
        assert_eq!(how(&format!("{here},attach")), Ok(("Cargo".to_owned(), Use::Attach)));
        assert_eq!(how("/nowhere/golden.img,new"), Ok(("golden".to_owned(), Use::Make)));
        assert_eq!(how("nbd:localhost:10809:exportname=golden"), Ok(("golden".to_owned(), Use::ResumeOnly)));
        assert_eq!(how("nbd:unix:/run/golden.sock"), Ok(("golden".to_owned(), Use::ResumeOnly)));
        for (text, name) in [
            ("rbd:guests/golden", "golden"),
            ("rbd:guests/team/golden.v2@ready", "golden.v2"),
            (r"rbd:guests/golden\:2:id=admin:conf=/etc/ceph/ceph.conf", "golden--2"),
        ] {
            assert_eq!(how(text), Ok((name.to_owned(), Use::ResumeOnly)));
            assert_eq!(image(text).unwrap().file, Path::new(text), "QEMU is given another text");
        }
        assert!(how("rbd:golden").unwrap_err().contains("rbd:POOL/IMAGE"));
        assert!(how("/nowhere").unwrap_err().contains("/nowhere,new"));
        for wrong in [
            "nbd:",
            "nbd:localhost",
            "nbd::1",
            "rbd:",
            "rbd:guests",
            "rbd:guests/",
            "rbd:/golden",
            "rbd:guests//golden",
            "rbd:guests/golden@",
            "rbd:a/b/c/d",
            "rbd:guests/golden:admin",
            "/nowhere,attach",
            "/nowhere,soon",
            &format!("{here},new"),
            "/",
        ] {
            assert!(how(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn two_images_of_one_name_are_refused() {
        let one = image("/nowhere/a.img,new").unwrap();
        assert!(check_images(std::slice::from_ref(&one)).is_ok());
        assert!(check_images(&[one.clone(), one]).is_err());
    }
}
