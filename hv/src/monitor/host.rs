//! The monitor's commands on the real machine: [`Guests`] is [`Host`] over `guest`, `sched` and the VM.
//!
//! Everything is done by the CPU that goes round, with no lock held. Sentences that a person reads are made
//! here and in `cmd`, nowhere below. Called by `desk`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use vmobject::lock::Held;

use super::cmd::Host;
use super::configure::{Twin, configure, twin};
use super::paced;
use super::parse::Until;
use super::view::{self, Objects};
use crate::arch::context::Trap;
use crate::arch::timer;
use crate::guest::exit::Ending;
use crate::guest::family::Birth;
use crate::guest::snapshot::{self, Keep, Origin, Snapshot, SnapshotError};
use crate::guest::stored;
use crate::guest::vcpu::Vcpu;
use crate::guest::{Guest, GuestId, Life, balloon, console, create, table};
use crate::mm;
use crate::sched::fork::{Begin, fork};
use crate::sched::jobs;
use crate::sched::load::Cpu;
use crate::sched::{self, Outside};

/// Bytes of a guest's log that are copied or searched at once.
const LOG_PART: usize = 128;

/// The machine ends when its last guest has.
static LEAVING: AtomicBool = AtomicBool::new(false);

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

    /// Does something with a guest while none of its vCPUs has anything in a CPU, and says for how many ticks that was.
    fn still<R>(
        &mut self,
        guest: &Arc<Guest>,
        work: impl FnOnce(&Cpu, &mut Held<'_, 0>) -> Result<R, SnapshotError>,
    ) -> Result<(R, u64), String> {
        match sched::still::while_still(guest, self.cpu, self.outside, self.held, work) {
            Ok((Ok(value), pause)) => Ok((value, pause)),
            Ok((Err(error), _)) => Err(error.to_string()),
            Err(restless) => Err(format!("guest {}: {restless}", guest.id)),
        }
    }

    /// What lets interrupts in, and what holds no lock beside it.
    fn resting(&mut self) -> (impl Fn(&mut Held<'_, 0>) + use<'_, 'a, 'h>, &mut Held<'h, 0>) {
        let (cpu, outside) = (&*self.cpu, self.outside);
        (move |held: &mut Held<'_, 0>| sched::let_interrupts_in(cpu, outside, held), &mut *self.held)
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

fn is_not(guest: &Guest, wanted: &str) -> String {
    let is = if guest.is_kept_still() { "just being copied or reset" } else { state(guest) };
    format!("guest {} is {is}, not {wanted}", guest.id)
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

    fn create_from(&mut self, id: GuestId, &Twin { from, name, grant }: &Twin<'_>) -> Result<u32, String> {
        let moment = self.moment(from, id)?;
        let name = name.map_or_else(|| format!("{from}.{id}"), String::from);
        if table::find(&name, self.held).is_some() {
            return Err(format!("there is a guest '{name}' already"));
        }
        let birth = Birth::first(grant.unwrap_or(moment.config().grant_fork));
        let (cpu, outside) = (&*self.cpu, self.outside);
        let rest = |held: &mut Held<'_, 0>| sched::take_interrupts(cpu, outside, held);
        let guest =
            snapshot::make(&moment, id, name, birth, &rest, self.held).map_err(|error| error.to_string())?;
        self.launch(guest)
    }
}

impl Host for Guests<'_, '_> {
    fn rest(&mut self) {
        sched::let_interrupts_in(self.cpu, self.outside, self.held);
    }

    fn guests(&mut self) -> Value {
        let (rest, held) = self.resting();
        let objects = Objects::look(&rest, held);
        let attached = console::attached();
        let rows = table::all(held).into_iter().map(|guest| {
            rest(held);
            let holding = objects.holding(&guest);
            rest(held);
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
                "share_pages": holding.share.resident,
                "own_pages": mm::vm().own_frames(&guest.map, held),
                "limit_pages": guest.map.limit(),
                "console_bytes": guest.log.total(held),
                "attached": attached == Some(guest.id),
            })
        });
        view::all_rows(rows)
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
        if let Some(twin) = twin(options)? {
            return self.create_from(id, &twin);
        }
        let config = configure(id, options)?;
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
        let draft = snapshot::draft(&guest, self.held).map_err(|error| error.to_string())?;
        self.rest();
        if let Some(name) = name.filter(|name| stored::exists(name, self.held)) {
            return Err(format!("a disk for stored guests is called '{name}'; 'save' stores there"));
        }
        let keep = Keep::Shadowed;
        self.rest();
        let (moment, _) = self.still(&guest, |_, held| snapshot::take(&guest, draft, keep, held))?;
        self.rest();
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
        let mut rows = Vec::new();
        while let Some(kept) = snapshot::nth(rows.len(), self.held) {
            if !view::add_row(&mut rows, || row(&kept)) {
                break;
            }
            self.rest();
        }
        Value::Array(rows)
    }

    fn delete(&mut self, name: &str) -> Result<(), String> {
        let start = timer::now();
        if !snapshot::forget(name, self.held) {
            return Err(unknown(name));
        }
        log::info!("snapshot {name}: deleted in {} ticks", timer::now().wrapping_sub(start));
        Ok(())
    }

    fn reset(&mut self, id: u32, name: Option<&str>) -> Result<String, String> {
        let start = timer::now();
        let guest = self.guest(id)?;
        let name = match name {
            Some(name) => name.to_string(),
            None => snapshot::origin(guest.id, self.held)
                .ok_or_else(|| format!("guest {id} came from no snapshot that is kept; name one"))?,
        };
        let moment = snapshot::find(&name, guest.id, self.held).ok_or_else(|| unknown(&name))?;
        let outside = self.outside;
        let (_, pause) = self.still(&guest, |cpu, held| {
            let rest = |held: &mut Held<'_, 0>| sched::take_interrupts(cpu, outside, held);
            snapshot::restore(&guest, &moment, &rest, held)
        })?;
        sched::start_all(&guest, self.held);
        let total = timer::now().wrapping_sub(start);
        log::info!("guest {id}: reset, still for {pause} ticks, {total} in all");
        Ok(name)
    }

    fn save(&mut self, id: u32, image: &str, rate: Option<u64>) -> Result<u32, String> {
        let guest = self.guest(id)?;
        // It alone may keep the half from being written that comes next.
        stored::forget_stale(image, self.held);
        let rate = rate.map(|mib| mib.saturating_mul(1 << 20));
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

    fn balloon(&mut self, id: u32, mib: Option<u64>) -> Result<Value, String> {
        let guest = self.guest(id)?;
        let memory = guest.config.memory >> 20;
        if let Some(mib) = mib {
            let taken = memory.checked_sub(mib).ok_or_else(|| {
                format!("guest {id} has {memory} MiB of RAM; its balloon cannot give it more")
            })?;
            let pages = u32::try_from(taken << 8).map_err(|_| format!("{taken} MiB are too much"))?;
            let kicks = balloon::set_target(&guest, pages, self.held);
            sched::wake_many(&guest, kicks, self.held);
        }
        let look = balloon::look(&guest, self.held);
        sched::attend(&guest, self.held);
        let (wanted, actual) = look.pages();
        let (inflated, reported) = look.given_back();
        let said: serde_json::Map<String, Value> =
            look.statistics().map(|(name, value)| (name.to_string(), json!(value))).collect();
        Ok(json!({
            "guest": id, "driver": look.is_driven(), "memory_mib": memory,
            "wanted_pages": wanted, "balloon_pages": actual,
            "inflated_pages": inflated, "reported_pages": reported, "said": said,
        }))
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
                        view::add_told(&mut row, told);
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
        if done { Ok(()) } else { Err(is_not(&guest, "running")) }
    }

    fn resume(&mut self, id: u32) -> Result<(), String> {
        let guest = self.guest(id)?;
        let done = sched::resume(&guest, self.held);
        if done { Ok(()) } else { Err(is_not(&guest, "paused")) }
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

    fn limit(&mut self, id: u32, resident: Option<Option<u64>>) -> Result<Value, String> {
        let guest = self.guest(id)?;
        if let Some(kib) = resident {
            let frames = kib.map(|kib| u32::try_from(kib / view::PAGE_KIB).unwrap_or(u32::MAX - 1));
            mm::vm()
                .set_limit(&guest.map, frames, self.held)
                .map_err(|error| view::refused_limit(&guest, error))?;
            sched::memory_freed(self.held);
        }
        Ok(view::limit(&guest, self.held))
    }

    fn log(&mut self, id: u32) -> Result<String, String> {
        let guest = self.guest(id)?;
        let (mut text, mut bytes) = (String::new(), Vec::new());
        // The end of it, when there is no memory for all.
        let mut sizes = [console::LOG_BYTES, console::LOG_BYTES / 8].into_iter();
        let most = sizes.find(|&size| text.try_reserve_exact(size).is_ok());
        let most = most.ok_or("no memory for a copy of the log")? as u64;
        let end = guest.log.total(self.held);
        let mut from = end.saturating_sub(most);
        while from < end
            && let Some((start, more)) = guest.log.next(from, LOG_PART, self.held)
        {
            from = start + more.len() as u64;
            bytes.extend(more);
            let length = paced::add_text(&mut text, &bytes, from >= end);
            bytes.drain(..length);
            self.rest();
        }
        Ok(text)
    }

    fn map(&mut self, id: u32) -> Result<Value, String> {
        let guest = self.guest(id)?;
        let (rest, held) = self.resting();
        Ok(view::map(&guest, &rest, held))
    }

    fn objects(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guest = id.map(|id| self.guest(id)).transpose()?;
        let (rest, held) = self.resting();
        Ok(Objects::look(&rest, held).tree(guest.as_deref(), &rest, held))
    }

    fn memory(&mut self) -> Value {
        let (rest, held) = self.resting();
        let mut value = Objects::look(&rest, held).memory(&rest, held);
        value["vmid_rollovers"] = json!(mm::machine::vmid_rollovers());
        value
    }

    fn swap(&mut self) -> Value {
        view::swap(self.held)
    }

    fn stats(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guest = id.map(|id| self.guest(id)).transpose()?;
        let guests = guest.clone().map_or_else(|| table::all(self.held), |guest| [guest].into());
        let mut sums = [0; 10];
        for guest in &guests {
            for vcpu in &guest.vcpus {
                let counts = &vcpu.counts;
                let each = [
                    &counts.exits,
                    &counts.calls,
                    &counts.mmio,
                    &counts.sysreg,
                    &counts.faults,
                    &counts.interrupts,
                    &counts.waits,
                    &counts.loads,
                    &counts.ticks,
                    &counts.injected,
                ];
                sums.iter_mut().zip(each).for_each(|(sum, count)| *sum += count.load(Ordering::Relaxed));
            }
            self.rest();
        }
        let [all, calls, mmio, sysreg, faults, interrupts, waits, loads, ticks, injected]: [u64; 10] = sums;
        let exits = json!({
            "all": all, "calls": calls, "mmio": mmio, "sysreg": sysreg, "faults": faults,
            "interrupts": interrupts,
        });
        self.rest();
        let (rest, held) = self.resting();
        let memory = view::faults(&guests, guest.is_none(), &rest, held);
        let mut value = json!({
            "scheduler": {"waits": waits, "loads": loads, "ticks": ticks},
            "injected": injected,
            "invalidates": crate::arch::tlb::invalidates(),
            "chores": mm::vm().has_chores(held),
            "chore_ticks": sched::chore_ticks(),
        });
        value["exits"] = exits;
        value["memory"] = memory;
        if let Some(guest) = guest {
            value["limit"] = view::limit(&guest, held);
        }
        Ok(value)
    }

    fn trace(&mut self, id: Option<u32>) -> Result<Value, String> {
        let guests = match id {
            Some(id) => [self.guest(id)?].into(),
            None => table::all(self.held),
        };
        let mut rows = Vec::new();
        for guest in guests.iter() {
            for vcpu in &guest.vcpus {
                for exit in vcpu.trace.before(vcpu.counts.exits.load(Ordering::Relaxed)) {
                    rows.push(row_of(guest, vcpu, exit));
                    self.rest();
                }
            }
        }
        Ok(Value::Array(rows))
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
        let (rest, held) = self.resting();
        sched::end_all(&rest, held);
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
            (Until::Text(text), Some(guest)) => loop {
                match guest.log.seek(text.as_bytes(), looked, LOG_PART, self.held) {
                    Some(found) => break Ok(found),
                    None => self.rest(),
                }
            },
        }
    }
}

/// An exit of a vCPU as a row.
fn row_of(guest: &Guest, vcpu: &Vcpu, (number, esr, pc): (u64, u64, u64)) -> Value {
    let (class, syndrome) = if esr == Trap::NO_SYNDROME {
        ("interrupt".to_string(), "-".to_string())
    } else {
        (format!("{:#04x}", esr >> 26 & 0x3f), format!("{esr:#x}"))
    };
    json!({
        "id": guest.id.0, "vcpu": vcpu.index, "number": number,
        "class": class, "esr": syndrome, "pc": format!("{pc:#x}"),
    })
}
