//! What a person asks `create` for, as the guest to be made: another like the machine's first, changed by `KEY=VALUE`.
//!
//! Whatever is wrong with it is answered in words, before anything is made. Called by `host`.

use alloc::format;
use alloc::string::{String, ToString};

use hv_abi::manifest::{FORK_LIMIT, mebibytes};
use serde_json::json;
use spin::Once;

use crate::guest::GuestId;
use crate::loader::manifest::parse_guest;
use crate::loader::{Boot, GuestConfig};

/// What a guest is made like when `create` does not say.
static MODEL: Once<GuestConfig> = Once::new();
/// Says what `create` makes when it is not told: another like the first guest.
pub fn set_model(config: &GuestConfig) {
    MODEL.call_once(|| config.clone());
}

/// What `create` was asked for: a guest like the first, changed by the options. The error is a sentence.
pub fn configure(id: GuestId, options: &[(String, String)]) -> Result<GuestConfig, String> {
    changed(id, options, MODEL.get())
}

/// What `create --from` was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Twin<'o> {
    /// The snapshot or image.
    pub from: &'o str,
    /// The guest's name, if it is to have one of its own.
    pub name: Option<&'o str>,
    /// How many children it may fork, if not as many as the snapshot's guest.
    pub grant: Option<u32>,
}

/// What was asked for, if it is a guest from a snapshot or image. The error is a sentence.
pub fn twin(options: &[(String, String)]) -> Result<Option<Twin<'_>>, String> {
    let given = |key: &str| options.iter().find(|(have, _)| have == key).map(|(_, value)| value.as_str());
    let (Some(from), name, grant) = (given("from"), given("name"), given("grant-fork")) else {
        return Ok(None);
    };
    if options.len() > 1 + usize::from(name.is_some()) + usize::from(grant.is_some()) {
        let what = "a guest from a snapshot can be given name and grant-fork; all else is the snapshot's";
        return Err(what.into());
    }
    Ok(Some(Twin { from, name, grant: grant.map(granted).transpose()? }))
}

/// How many children a guest may fork, as a person says it. The error is a sentence.
fn granted(word: &str) -> Result<u32, String> {
    let number = word.parse().ok().filter(|number| *number <= FORK_LIMIT);
    number.ok_or_else(|| format!("grant-fork: '{word}' is not a number up to {FORK_LIMIT}"))
}

/// The model, changed by the options.
fn changed(
    id: GuestId,
    options: &[(String, String)],
    model: Option<&GuestConfig>,
) -> Result<GuestConfig, String> {
    let given =
        |key: &str| options.iter().rev().find(|(have, _)| have == key).map(|(_, value)| value.as_str());
    let mut fields = json!({"name": given("name").map_or_else(|| format!("guest{id}"), String::from)});
    for (key, value) in options {
        match key.as_str() {
            "name" => {}
            "kernel" | "initrd" | "bios" | "append" => fields[key] = json!(value),
            "memory" => {
                let size = mebibytes(value);
                let wrong = || format!("memory: '{value}' is not a size; write 256M or 1G");
                fields["memory_mib"] = json!(size.ok_or_else(wrong)?);
            }
            "vcpus" => {
                let number: u64 = value.parse().map_err(|_| format!("vcpus: '{value}' is not a number"))?;
                fields["vcpus"] = json!(number);
            }
            "grant-fork" => {
                fields["grant_fork"] = json!(granted(value)?);
            }
            other => return Err(format!("create knows no '{other}'; 'help create' lists what it knows")),
        }
    }
    if let Some(model) = model {
        if given("kernel").is_none() && given("bios").is_none() {
            match &model.boot {
                Boot::Kernel { image, initrd } => {
                    fields["kernel"] = json!(image);
                    fields["initrd"] = json!(given("initrd").or(initrd.as_deref()));
                    if given("append").is_none() {
                        let (old, new) = (format!("guest.name={}", model.name), &fields["name"]);
                        let new = format!("guest.name={}", new.as_str().unwrap_or_default());
                        fields["append"] = json!(model.append.replace(&old, &new));
                    }
                }
                Boot::Bios { image } => fields["bios"] = json!(image),
            }
        }
        if given("memory").is_none() {
            fields["memory_mib"] = json!(model.memory >> 20);
        }
        if given("grant-fork").is_none() {
            fields["grant_fork"] = json!(model.grant_fork);
        }
        if given("vcpus").is_none() {
            fields["vcpus"] = json!(model.vcpus);
        }
    }
    let config = parse_guest(&fields.to_string()).map_err(|error| error.to_string())?;
    // Another like the first has its disks.
    Ok(GuestConfig { disks: model.map(|model| model.disks.clone()).unwrap_or_default(), ..config })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::borrow::ToOwned;
    use alloc::vec::Vec;

    fn model() -> GuestConfig {
        GuestConfig {
            name: "guest".into(),
            boot: Boot::Kernel { image: "kernel".into(), initrd: Some("initrd".into()) },
            append: "console=ttyAMA0 guest.name=guest quiet".into(),
            memory: 256 << 20,
            vcpus: 2,
            grant_fork: 0,
            disks: Vec::new(),
            stored: false,
        }
    }

    fn options(words: &[(&str, &str)]) -> Vec<(String, String)> {
        words.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn without_options_another_like_the_first_is_made() {
        let made = changed(GuestId(7), &[], Some(&model())).unwrap();
        let append = "console=ttyAMA0 guest.name=guest7 quiet".to_owned();
        assert_eq!(made, GuestConfig { name: "guest7".into(), append, ..model() });
    }

    #[test]
    fn options_replace_what_the_model_says() {
        let made = changed(
            GuestId(2),
            &options(&[
                ("name", "x"),
                ("kernel", "other"),
                ("memory", "1G"),
                ("vcpus", "4"),
                ("append", "a b"),
            ]),
            Some(&model()),
        )
        .unwrap();
        assert_eq!(made.boot, Boot::Kernel { image: "other".into(), initrd: None });
        assert_eq!((made.name.as_str(), made.append.as_str()), ("x", "a b"));
        assert_eq!((made.memory, made.vcpus), (1 << 30, 4));
    }

    #[test]
    fn a_guest_from_a_snapshot_is_given_a_name_and_a_grant_and_nothing_else() {
        assert_eq!(twin(&options(&[("name", "x")])), Ok(None));
        let asked = options(&[("grant-fork", "4"), ("from", "golden")]);
        assert_eq!(twin(&asked), Ok(Some(Twin { from: "golden", name: None, grant: Some(4) })));
        for more in [("memory", "1G"), ("grant-fork", "1025"), ("from", "other")] {
            assert!(twin(&options(&[("from", "golden"), ("name", "x"), more])).is_err(), "{more:?}");
        }
    }

    #[test]
    fn what_create_does_not_know_or_cannot_be_is_refused_in_words() {
        let refused =
            |key, value| changed(GuestId(1), &options(&[(key, value)]), Some(&model())).unwrap_err();
        assert!(refused("memroy", "1G").contains("'memroy'"));
        assert!(refused("memory", "lots").contains("256M"));
        assert!(refused("memory", "99999999999999G").contains("not a"));
        assert!(refused("vcpus", "0").contains("vcpus"));
        assert!(refused("vcpus", "-1").contains("not a number"));
        for grant in ["many", "-1", "1025"] {
            assert!(refused("grant-fork", grant).contains("a number up to 1024"), "{grant}");
        }
        assert!(changed(GuestId(1), &[], None).unwrap_err().contains("neither a kernel nor a bios"));
    }
}
