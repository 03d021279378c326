//! The monitor's commands on the real machine: [`Guests`] is [`Host`] over `guest`, `sched` and the VM.
//!
//! Everything is done by the CPU that goes round, with no lock held. Sentences that a person reads are made
//! here and in `cmd`, nowhere below. Called by `desk`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use hv_abi::manifest::mebibytes;
use serde_json::{Value, json};
use spin::Once;
use vmobject::lock::Held;

use super::cmd::Host;
use super::parse::Until;
use super::view::{self, Objects};
use crate::arch::context::Trap;
use crate::guest::exit::Ending;
use crate::guest::family::Birth;
use crate::guest::snapshot::{self, Keep, Origin, Snapshot, SnapshotError};
use crate::guest::stored;
use crate::guest::vcpu::Vcpu;
use crate::guest::{Guest, GuestId, Life, console, create, table};
use crate::loader::manifest::parse_guest;
use crate::loader::{Boot, GuestConfig};
use crate::mm;
use crate::sched::fork::{Begin, fork};
use crate::sched::jobs;
use crate::sched::load::Cpu;
use crate::sched::{self, Outside};

/// What a guest is made like when `create` does not say.
static MODEL: Once<GuestConfig> = Once::new();
/// The machine ends when its last guest has.
static LEAVING: AtomicBool = AtomicBool::new(false);

/// Says what `create` makes when it is not told: another like the first guest.
pub fn set_model(config: &GuestConfig) {
    MODEL.call_once(|| config.clone());
}

/// True when the machine is to end with its last guest.
pub fn is_leaving() -> bool {
    LEAVING.load(Ordering::SeqCst)
}

/// Has the machine end with its last guest.
pub fn leave_with_the_last_guest() {
    LEAVING.store(true, Ordering::SeqCst);
}

/// The guests, for one command, on the CPU that carries it out.
pub struct Guests<'a, 'h> {
    held: &'a mut Held<'h, 0>,
    cpu: &'a mut Cpu,
    outside: &'a dyn Outside,
}

impl<'a, 'h> Guests<'a, 'h> {
    /// The guests as this CPU reaches them.
    pub fn new(outside: &'a dyn Outside, cpu: &'a mut Cpu, held: &'a mut Held<'h, 0>) -> Self {
        Self { held, cpu, outside }
    }

    /// Does something with a guest while none of its vCPUs has anything in a CPU.
    fn still<R>(
        &mut self,
        guest: &Arc<Guest>,
        work: impl FnOnce(&Guest, &mut Held<'_, 0>) -> Result<R, SnapshotError>,
    ) -> Result<R, String> {
        let result =
            sched::still::while_still(guest, self.cpu, self.outside, self.held, |held| work(guest, held));
        match result {
            Ok((Ok(value), _)) => Ok(value),
            Ok((Err(error), _)) => Err(error.to_string()),
            Err(restless) => Err(format!("guest {}: {restless}", guest.id)),
        }
    }

    /// Lets a new guest run.
    fn launch(&mut self, guest: Arc<Guest>) -> Result<u32, String> {
        let id = guest.id.0;
        if sched::launch(guest, self.held) { Ok(id) } else { Err("there are too many guests".into()) }
    }

    fn guest(&mut self, id: u32) -> Result<Arc<Guest>, String> {
        table::get(GuestId(id), self.held).ok_or_else(|| gone(id))
    }
}

fn unknown(snapshot: &str) -> String {
    format!("there is no snapshot '{snapshot}'; 'snapshots' lists them")
}

fn gone(id: u32) -> String {
    format!("guest {id} is gone")
}

fn state(guest: &Guest) -> &'static str {
    match guest.life() {
        Life::Running => "running",
        Life::Paused => "paused",
        Life::Ending => "ending",
    }
}

impl Guests<'_, '_> {
    /// The snapshot of that name, for a guest that is made from it.
    fn moment(&mut self, from: &str, id: GuestId) -> Result<Arc<Snapshot>, String> {
        let taken = matches!(snapshot::source(from, self.held), Some(Origin::Guest(_)));
        if !taken && stored::exists(from, self.held) {
            return stored::moment(from, id, self.held).map_err(|error| format!("{from}: {error}"));
        }
        snapshot::find(from, id, self.held).ok_or_else(|| unknown(from))
    }

    fn create_from(&mut self, id: GuestId, from: &str, name: Option<String>) -> Result<u32, String> {
        let moment = self.moment(from, id)?;
        let name = name.unwrap_or_else(|| format!("{from}.{id}"));
        if table::find(&name, self.held).is_some() {
            return Err(format!("there is a guest '{name}' already"));
        }
        let (cpu, outside, birth) = (&*self.cpu, self.outside, Birth::first(moment.config().grant_fork));
        let rest = |held: &mut Held<'_, 0>| sched::take_interrupts(cpu, outside, held);
        let guest =
            snapshot::make(&moment, id, name, birth, &rest, self.held).map_err(|error| error.to_string())?;
        self.launch(guest)
    }
}

impl Host for Guests<'_, '_> {
    fn guests(&mut self) -> Value {
        let objects = Objects::look(self.held);
        let attached = console::attached();
        let rows = table::all(self.held).into_iter().map(|guest| {
            let holding = objects.holding(&guest, self.held);
            let states: Vec<&str> = guest.vcpus.iter().map(|vcpu| vcpu.word()).collect();
            json!({
                "id": guest.id.0,
                "name": guest.name(),
                "state": state(&guest),
                "vcpus": states.join(" "),
                "memory_mib": guest.config.memory >> 20,
                "private_pages": holding.private,
                "shared_pages": holding.shared,
                "swapped_pages": holding.swapped,
                "console_bytes": guest.log.total(self.held),
                "attached": attached == Some(guest.id),
            })
        });
        Value::Array(rows.collect())
    }

    fn find(&mut self, guest: &str) -> Result<u32, String> {
        table::find(guest, self.held)
            .map(|guest| guest.id.0)
            .ok_or_else(|| format!("there is no guest '{guest}'; 'guests' lists them"))
    }

    fn create(&mut self, options: &[(String, String)]) -> Result<u32, String> {
        if is_leaving() && table::is_empty(self.held) {
            return Err("the machine is shutting down".into());
        }
        let id = table::next_id();
        if let Some((_, snapshot)) = options.iter().find(|(key, _)| key == "from") {
            let name = options.iter().find(|(key, _)| key == "name").map(|(_, name)| name.clone());
            if options.len() > 1 + usize::from(name.is_some()) {
                return Err("a guest from a snapshot can be given a name; all else is the snapshot's".into());
            }
            return self.create_from(id, snapshot, name);
        }
        let config = configure(id, options, MODEL.get())?;
        if table::find(&config.name, self.held).is_some() {
            return Err(format!("there is a guest '{}' already", config.name));
        }
        let (cpu, outside) = (&*self.cpu, self.outside);
        let rest = |held: &mut Held<'_, 0>| sched::take_interrupts(cpu, outside, held);
        let guest = create::create(id, config, None, &rest, self.held).map_err(|error| error.to_string())?;
        self.launch(guest)
    }

    fn clone(&mut self, id: u32, count: u32, paused: bool) -> Result<Vec<u32>, String> {
        let source = self.guest(id)?;
        let begin = if paused { Begin::Paused } else { Begin::Running };
        let children = fork(&source, count, begin, self.cpu, self.outside, self.held);
        children
            .map(|ids| ids.iter().map(|id| id.0).collect())
            .map_err(|error| format!("guest {id}: {error}"))
    }

    fn snapshot(&mut self, id: u32, name: Option<&str>) -> Result<String, String> {
        let guest = self.guest(id)?;
        let random = snapshot::draw(&guest, self.held);
        if let Some(name) = name.filter(|name| stored::exists(name, self.held)) {
            return Err(format!("a disk for stored guests is called '{name}'; 'save' stores there"));
        }
        let keep = Keep::Shadowed;
        let moment = self.still(&guest, |guest, held| snapshot::take(guest, random, keep, held))?;
        snapshot::keep(moment, Origin::Guest(guest.id), name, self.held).map_err(|error| error.to_string())
    }

    fn snapshots(&mut self) -> Value {
        let row = |kept: &snapshot::KeptInfo| {
            let of = match kept.source {
                Origin::Guest(guest) => json!(guest.0),
                Origin::Stored(generation) => json!(format!("stored, generation {generation}")),
            };
            json!({
                "name": kept.name, "of": of, "vcpus": kept.vcpus,
                "memory_mib": kept.memory >> 20, "guests": kept.guests,
            })
        };
        Value::Array(snapshot::all(self.held).iter().map(row).collect())
    }

    fn delete(&mut self, name: &str) -> Result<(), String> {
        if snapshot::forget(name, self.held) { Ok(()) } else { Err(unknown(name)) }
    }

    fn reset(&mut self, id: u32, name: Option<&str>) -> Result<String, String> {
        let guest = self.guest(id)?;
        let name = match name {
            Some(name) => name.to_string(),
            None => snapshot::origin(guest.id, self.held)
                .ok_or_else(|| format!("guest {id} came from no snapshot that is kept; name one"))?,
        };
        let moment = snapshot::find(&name, guest.id, self.held).ok_or_else(|| unknown(&name))?;
        let outside = self.outside;
        self.still(&guest, |guest, held| {
            snapshot::restore(guest, &moment, &|held| outside.poll(held), held)
        })?;
        sched::start_all(&guest, self.held);
        Ok(name)
    }

    fn save(&mut self, id: u32, image: &str, rate: Option<u64>) -> Result<u32, String> {
        let guest = self.guest(id)?;
        // It alone may keep the half from being written that comes next.
        stored::forget_stale(image, self.held);
        let rate = rate.map(|mib| mib << 20);
        jobs::save(&guest, image, rate, self.cpu, self.outside, self.held)
    }

    fn jobs(&mut self) -> Value {
        let row = |job: &jobs::Info| {
            let (done, all) = job.progress;
            let state = match &job.state {
                jobs::State::Running => "running".to_string(),
                jobs::State::Done => "done".to_string(),
                jobs::State::Cancelled => "cancelled".to_string(),
                jobs::State::Failed(why) => format!("failed: {why}"),
            };
            json!({
                "id": job.id, "guest": job.guest.0, "image": job.image, "state": state,
                "percent": done * 100 / all.max(1), "pages": all, "stored_pages": job.stored, "ms": job.ms,
            })
        };
        Value::Array(jobs::all(self.held).iter().map(row).collect())
    }

    fn cancel(&mut self, job: u32) -> Result<(), String> {
        if jobs::cancel(job, self.held) {
            Ok(())
        } else {
            Err(format!("no job {job} can be cancelled; 'jobs' lists them"))
        }
    }

    fn images(&mut self) -> Value {
        let row = |info: &stored::Info| {
            let mut row =
                json!({"name": info.name, "disk_mib": info.bytes >> 20, "read_only": info.read_only});
            match &info.image {
                Ok((generation, text, pages)) => {
                    row["state"] = json!("stored");
                    row["generation"] = json!(generation);
                    row["stored_pages"] = json!(pages);
                    if let Ok(Value::Object(told)) = serde_json::from_str(text) {
                        for (key, value) in told {
                            row[key] = value;
                        }
                    }
                }
                Err(why) => row["state"] = json!(why),
            }
            row
        };
        Value::Array(stored::all(self.held).iter().map(row).collect())
    }

    fn pause(&mut self, id: u32) -> Result<(), String> {
        let guest = self.guest(id)?;
        let done = sched::pause(&guest, self.held);
        if done { Ok(()) } else { Err(format!("guest {id} is {}, not running", state(&guest))) }
    }

    fn resume(&mut self, id: u32) -> Result<(), String> {
        let guest = self.guest(id)?;
        let done = sched::resume(&guest, self.held);
        if done { Ok(()) } else { Err(format!("guest {id} is {}, not paused", state(&guest))) }
    }

    fn kill(&mut self, id: u32) -> Result<(), String> {
        let guest = self.guest(id)?;
        sched::end(&guest, Ending::Killed, self.held);
        Ok(())
    }

    fn attach(&mut self, id: u32) -> Result<(), String> {
        console::attach(Some(self.guest(id)?.id));
        Ok(())
    }

    fn send(&mut self, id: u32, bytes: &[u8]) -> Result<(), String> {
        let guest = self.guest(id)?;
        guest.log.mark(self.held);
        let kicks = guest.type_in(bytes, self.held);
        sched::wake_many(&guest, kicks, self.held);
        Ok(())
    }

    fn log(&mut self, id: u32) -> Result<String, String> {
        let bytes = self.guest(id)?.log.read(self.held).ok_or("no memory for a copy of the log")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn map(&mut self, id: u32) -> Result<Value, String> {
        let guest = self.guest(id)?;
        Ok(view::map(&guest, self.held))
    }

    fn objects(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guest = id.map(|id| self.guest(id)).transpose()?;
        Ok(Objects::look(self.held).tree(guest.as_deref(), self.held))
    }

    fn memory(&mut self) -> Value {
        let mut value = Objects::look(self.held).memory(self.held);
        value["vmid_rollovers"] = json!(mm::machine::vmid_rollovers());
        value
    }

    fn swap(&mut self) -> Value {
        view::swap(self.held)
    }

    fn stats(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guest = id.map(|id| self.guest(id)).transpose()?;
        let guests = guest.clone().map_or_else(|| table::all(self.held), |guest| [guest].into());
        let sum = |of: &dyn Fn(&Vcpu) -> u64| -> u64 {
            guests.iter().flat_map(|guest| guest.vcpus.iter()).map(of).sum()
        };
        let count =
            |of: fn(&Vcpu) -> &core::sync::atomic::AtomicU64| sum(&|vcpu| of(vcpu).load(Ordering::Relaxed));
        Ok(json!({
            "exits": {
                "all": count(|vcpu| &vcpu.counts.exits),
                "calls": count(|vcpu| &vcpu.counts.calls),
                "mmio": count(|vcpu| &vcpu.counts.mmio),
                "sysreg": count(|vcpu| &vcpu.counts.sysreg),
                "faults": count(|vcpu| &vcpu.counts.faults),
                "interrupts": count(|vcpu| &vcpu.counts.interrupts),
            },
            "scheduler": {
                "waits": count(|vcpu| &vcpu.counts.waits),
                "loads": count(|vcpu| &vcpu.counts.loads),
            },
            "injected": count(|vcpu| &vcpu.counts.injected),
            "invalidates": crate::arch::tlb::invalidates(),
            "memory": view::faults(&guests, guest.is_none()),
        }))
    }

    fn trace(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guests = match id {
            Some(id) => [self.guest(id)?].into(),
            None => table::all(self.held),
        };
        let rows = guests.iter().flat_map(|guest| guest.vcpus.iter().flat_map(|vcpu| exits(guest, vcpu)));
        Ok(Value::Array(rows.collect()))
    }

    fn check(&mut self) -> Result<Value, String> {
        let audit = sched::quiet::quietly(self.held, |held| mm::vm().check(held));
        match audit.ok_or("another CPU is busy for long; try again")? {
            Ok(audit) => Ok(json!({
                "clean": true,
                "frames": audit.frames,
                "objects": audit.objects,
                "slots": audit.slots,
                "maps": audit.maps,
                "entries": audit.entries,
                "leaves": audit.leaves,
            })),
            Err(violation) => Err(format!(
                "{} does not hold: {} at {:#x}, {:#x}",
                violation.invariant, violation.what, violation.place.0, violation.place.1
            )),
        }
    }

    fn shutdown(&mut self) -> Result<(), String> {
        leave_with_the_last_guest();
        jobs::cancel_all(self.held);
        for guest in table::all(self.held) {
            sched::end(&guest, Ending::Killed, self.held);
        }
        Ok(())
    }

    fn reached(&mut self, id: u32, until: &Until, looked: &mut u64) -> Result<bool, String> {
        if let Until::Job(id) = until {
            let job = jobs::all(self.held).into_iter().find(|job| job.id == *id);
            return match job.map(|job| job.state) {
                Some(jobs::State::Running) => Ok(false),
                Some(jobs::State::Done) => Ok(true),
                Some(jobs::State::Cancelled) => Err(format!("job {id} was cancelled")),
                Some(jobs::State::Failed(why)) => Err(why),
                None => Err(format!("job {id} is over and forgotten")),
            };
        }
        let guest = table::get(GuestId(id), self.held);
        match (until, guest) {
            (Until::Job(_), _) => Ok(true),
            (Until::Gone, guest) => Ok(guest.is_none()),
            (Until::State(wanted), None) if wanted == "gone" => Ok(true),
            (Until::State(_) | Until::Text(_), None) => Err(gone(id)),
            (Until::State(wanted), Some(guest)) => Ok(wanted == state(&guest)),
            (Until::Text(text), Some(guest)) => Ok(guest.log.seek(text.as_bytes(), looked, self.held)),
        }
    }
}

/// The last exits of a vCPU as rows.
fn exits(guest: &Guest, vcpu: &Vcpu) -> Vec<Value> {
    let (guest, index) = (guest.id.0, vcpu.index);
    let row = |(number, esr, pc): (u64, u64, u64)| {
        let (class, syndrome) = if esr == Trap::NO_SYNDROME {
            ("interrupt".to_string(), "-".to_string())
        } else {
            (format!("{:#04x}", esr >> 26 & 0x3f), format!("{esr:#x}"))
        };
        json!({
            "id": guest, "vcpu": index, "number": number,
            "class": class, "esr": syndrome, "pc": format!("{pc:#x}"),
        })
    };
    vcpu.trace.before(vcpu.counts.exits.load(Ordering::Relaxed)).map(row).collect()
}

/// What `create` was asked for: the model, changed by the options.
fn configure(
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
                let number: u32 =
                    value.parse().map_err(|_| format!("grant-fork: '{value}' is not a number"))?;
                fields["grant_fork"] = json!(number);
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

    fn model() -> GuestConfig {
        GuestConfig {
            name: "guest".into(),
            boot: Boot::Kernel { image: "kernel".into(), initrd: Some("initrd".into()) },
            append: "console=ttyAMA0 guest.name=guest quiet".into(),
            memory: 256 << 20,
            vcpus: 2,
            grant_fork: 0,
            disks: Vec::new(),
        }
    }

    fn options(words: &[(&str, &str)]) -> Vec<(String, String)> {
        words.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn without_options_another_like_the_first_is_made() {
        let made = configure(GuestId(7), &[], Some(&model())).unwrap();
        let append = "console=ttyAMA0 guest.name=guest7 quiet".to_owned();
        assert_eq!(made, GuestConfig { name: "guest7".into(), append, ..model() });
    }

    #[test]
    fn options_replace_what_the_model_says() {
        let made = configure(
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
    fn what_create_does_not_know_or_cannot_be_is_refused_in_words() {
        let refused =
            |key, value| configure(GuestId(1), &options(&[(key, value)]), Some(&model())).unwrap_err();
        assert!(refused("memroy", "1G").contains("'memroy'"));
        assert!(refused("memory", "lots").contains("256M"));
        assert!(refused("memory", "99999999999999G").contains("not a"));
        assert!(refused("vcpus", "0").contains("vcpus"));
        assert!(refused("vcpus", "-1").contains("not a number"));
        assert!(configure(GuestId(1), &[], None).unwrap_err().contains("neither a kernel nor a bios"));
    }
}
