//! Port 1 of a virtio console as a stream of bytes: the hypervisor's control port.
//!
//! Nothing waits: [`Console::read`] takes what has arrived, [`Console::write`] what there is room for, and both first
//! take in what the device says of its ports. Each direction has eight buffers of 512 bytes. QEMU holds back input while
//! no buffer is free, and keeps output that its socket does not take, so a slow reader loses nothing on either side. Of a
//! `virtconsole`, which alone may be its port 0, QEMU throws away what the socket does not take: that is why this drives a
//! `virtserialport`, which is port 1 or above, and so needs MULTIPORT. There is no other way to a port here.
//!
//! The device is told DEVICE_READY and adds its ports; port 1 is answered PORT_READY and PORT_OPEN, from when on QEMU
//! lets input through, and the device says PORT_OPEN whenever a host comes or goes. While none is connected, output goes
//! nowhere: nobody has asked.

use super::buffers::{Buffers, Filled, NotGiven};
use super::{DeviceError, Mmio, negotiate};
use virtio_drivers::transport::{DeviceStatus, Transport};

/// The feature of having more than one port, and control queues.
pub(super) const MULTIPORT: u64 = 1 << 1;
/// The port that we drive, and its queues.
pub(super) const PORT: u32 = 1;
pub(super) const RECEIVE: u16 = 4;
pub(super) const TRANSMIT: u16 = 5;
/// The control queues: from the device, and to it.
pub(super) const CONTROL_RECEIVE: u16 = 2;
pub(super) const CONTROL_TRANSMIT: u16 = 3;

/// Buffers of a direction.
const QUEUE: usize = 8;
/// Buffers of a control queue: all that QEMU's have. It drops a message for which there is none.
pub(super) const CONTROL: usize = 32;

pub(super) const DEVICE_READY: u16 = 0;
pub(super) const PORT_ADD: u16 = 1;
pub(super) const PORT_REMOVE: u16 = 2;
pub(super) const PORT_READY: u16 = 3;
pub(super) const CONSOLE_PORT: u16 = 4;
pub(super) const PORT_OPEN: u16 = 6;

/// What either side says of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) const BYTES: usize = 8;

    pub(super) fn from_bytes([a, b, c, d, e, f, g, h]: [u8; Self::BYTES]) -> Self {
        Self {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let ([a, b, c, d], [e, f], [g, h]) =
            (self.id.to_le_bytes(), self.event.to_le_bytes(), self.value.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }
}

/// How a device broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    /// It gave back a buffer that it did not have.
    NotGiven,
    /// A message of it is too short to be one.
    Short,
    /// It wants one answer after the other, and takes none.
    Deaf,
}

impl From<NotGiven> for Broken {
    fn from(_: NotGiven) -> Self {
        Self::NotGiven
    }
}

/// A buffer that has arrived and is not read to its end.
#[derive(Clone, Copy)]
struct Arrived {
    buffer: usize,
    next: usize,
    end: usize,
}

/// One console.
pub struct Console<T: Transport = Mmio> {
    transport: T,
    receive: Buffers<QUEUE>,
    transmit: Buffers<QUEUE>,
    control_receive: Buffers<CONTROL>,
    control_transmit: Buffers<CONTROL>,
    arrived: Option<Arrived>,
    /// A host is connected to the port.
    connected: bool,
    /// It was said that another port is none of ours.
    told: bool,
    gone: bool,
}

impl<T: Transport> Console<T> {
    /// Takes the console over, resetting it, gives it buffers to fill, and says that it may add its ports.
    pub fn new(mut transport: T) -> Result<Self, DeviceError> {
        if negotiate(&mut transport, MULTIPORT)? & MULTIPORT == 0 {
            return Err(DeviceError::OnePort);
        }
        let receive = Buffers::new(&mut transport, RECEIVE)?;
        let transmit = Buffers::new(&mut transport, TRANSMIT)?;
        let control_receive = Buffers::new(&mut transport, CONTROL_RECEIVE)?;
        let control_transmit = Buffers::new(&mut transport, CONTROL_TRANSMIT)?;
        transport.finish_init();
        let mut console = Self {
            transport,
            receive,
            transmit,
            control_receive,
            control_transmit,
            arrived: None,
            connected: false,
            told: false,
            gone: false,
        };
        console.control_receive.offer_all();
        console.control_receive.kick(&mut console.transport);
        console.receive.offer_all();
        console.receive.kick(&mut console.transport);
        // It is of no port.
        console.say(Message { id: u32::MAX, event: DEVICE_READY, value: 1 });
        Ok(console)
    }

    /// Acknowledges the interrupt; call before reading until nothing comes.
    pub fn acknowledge(&mut self) {
        self.transport.ack_interrupt();
    }

    /// Takes bytes that have arrived; 0 when there are none.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        self.listen();
        let mut count = 0;
        // No buffer twice: a device may fill them with nothing as fast as they are offered.
        for _ in 0..=QUEUE {
            if count == out.len() {
                break;
            }
            let Some(mut arrived) = self.arrived.take().or_else(|| self.next_arrived()) else { break };
            let bytes = (arrived.end - arrived.next).min(out.len() - count);
            self.receive.copy(arrived.buffer, arrived.next, &mut out[count..count + bytes]);
            arrived.next += bytes;
            count += bytes;
            if arrived.next == arrived.end {
                self.receive.offer(arrived.buffer);
                self.receive.kick(&mut self.transport);
            } else {
                self.arrived = Some(arrived);
            }
        }
        count
    }

    /// True when the device has taken everything that was written, or nobody is there to take it.
    pub fn is_sent(&mut self) -> bool {
        self.listen();
        self.reclaim();
        !self.is_heard() || self.transmit.is_empty()
    }

    /// Sends as many bytes as there is room for, and says how many: all of them, into nowhere, where nobody is connected.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        self.listen();
        self.reclaim();
        if !self.is_heard() {
            return bytes.len();
        }
        let mut sent = 0;
        while let part @ 1.. = self.transmit.put(&bytes[sent..]) {
            sent += part;
        }
        if sent > 0 {
            self.transmit.kick(&mut self.transport);
        }
        sent
    }

    fn is_heard(&self) -> bool {
        self.connected && !self.gone
    }

    /// Takes back the buffers that the device has sent.
    fn reclaim(&mut self) {
        if !self.gone
            && let Err(error) = self.transmit.reclaim()
        {
            self.give_up(error.into());
        }
    }

    fn next_arrived(&mut self) -> Option<Arrived> {
        if self.gone {
            return None;
        }
        match self.receive.filled() {
            Ok(filled) => {
                let Filled { buffer, bytes } = filled?;
                // Whoever it is from was connected, even if there was no buffer for the message that said so.
                self.connected = true;
                Some(Arrived { buffer, next: 0, end: bytes })
            }
            Err(error) => {
                self.give_up(error.into());
                None
            }
        }
    }

    /// Takes in what the device has said of its ports: no more than it has buffers for, since it may go on for ever.
    fn listen(&mut self) {
        for _ in 0..CONTROL {
            if self.gone {
                return;
            }
            match self.next_message() {
                Ok(Some(message)) => self.take(message),
                Ok(None) => return,
                Err(broken) => self.give_up(broken),
            }
        }
    }

    fn next_message(&mut self) -> Result<Option<Message>, Broken> {
        let Some(Filled { buffer, bytes }) = self.control_receive.filled()? else { return Ok(None) };
        let mut message = [0; Message::BYTES];
        self.control_receive.copy(buffer, 0, &mut message);
        self.control_receive.offer(buffer);
        self.control_receive.kick(&mut self.transport);
        // What follows it is a name.
        if bytes < Message::BYTES { Err(Broken::Short) } else { Ok(Some(Message::from_bytes(message))) }
    }

    fn take(&mut self, Message { id, event, value }: Message) {
        match (event, id) {
            (PORT_ADD, PORT) => {
                self.say(Message { id, event: PORT_READY, value: 1 });
                self.say(Message { id, event: PORT_OPEN, value: 1 });
            }
            // One for a person, who gets the same bytes.
            (CONSOLE_PORT, PORT) => self.say(Message { id, event: PORT_OPEN, value: 1 }),
            (PORT_OPEN, PORT) => self.connected = value != 0,
            // Its queues stay, should it be added again.
            (PORT_REMOVE, PORT) => self.connected = false,
            (PORT_ADD, _) if !self.told => {
                self.told = true;
                log::warn!("control port: port {id} is not used; port {PORT} is, a virtserialport");
            }
            // Names, sizes, other ports.
            _ => {}
        }
    }

    fn say(&mut self, message: Message) {
        if self.gone {
            return;
        }
        if let Err(error) = self.control_transmit.reclaim() {
            return self.give_up(error.into());
        }
        if self.control_transmit.put(&message.to_bytes()) == 0 {
            return self.give_up(Broken::Deaf);
        }
        self.control_transmit.kick(&mut self.transport);
    }

    /// Resets a device that breaks the protocol.
    fn give_up(&mut self, broken: Broken) {
        log::error!("control port: broken: {broken:?}");
        self.transport.set_status(DeviceStatus::empty());
        self.gone = true;
    }
}

/// The device must not touch the queues' memory once it goes back.
impl<T: Transport> Drop for Console<T> {
    fn drop(&mut self) {
        self.transport.set_status(DeviceStatus::empty());
    }
}
