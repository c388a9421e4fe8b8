//! What the writer promises: order, bound, durability, and an end at the first fault.

use super::*;
use crate::storage::{Disk, Memory};

fn batch(pairs: &[(&str, &str)]) -> Batch {
    let mut batch = Batch::default();
    pairs.iter().for_each(|(key, value)| batch.put(*key, *value));
    batch
}

/// Two keys that must always agree.
fn twins(index: u64) -> Batch {
    let mut batch = Batch::default();
    batch.put("first", index.to_be_bytes());
    batch.put("second", index.to_be_bytes());
    batch
}

fn twins_on(disk: &Disk) -> u64 {
    let engine = Memory::open(disk);
    let number = |key: &[u8]| {
        let value = engine.get(key).unwrap();
        value.map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
    };
    assert_eq!(number(b"first"), number(b"second"), "half a batch");
    number(b"first")
}

fn never_by_itself() -> WriterOptions {
    WriterOptions { flush_interval: Duration::from_secs(3600), ..WriterOptions::default() }
}

/// Tells of each batch that arrives and waits for leave, if told to; fails as `after` says.
struct Probe {
    memory: Memory,
    arrived: mpsc::Sender<usize>,
    leave: Option<mpsc::Receiver<()>>,
    applies: u32,
    after: Box<dyn FnMut(u32) -> io::Result<()> + Send>,
}

impl Engine for Probe {
    fn apply(&mut self, batch: Batch) -> io::Result<()> {
        self.applies += 1;
        // A test that does not watch has dropped its end.
        let _ = self.arrived.send(batch.changes.len());
        if let Some(leave) = &self.leave {
            leave.recv().unwrap();
        }
        (self.after)(self.applies)?;
        self.memory.apply(batch)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.memory.flush()
    }
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.memory.get(key)
    }
    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
        self.memory.scan(prefix, visit)
    }
    fn size_bytes(&self) -> u64 {
        7
    }
}

struct Gate {
    arrived: mpsc::Receiver<usize>,
    leave: mpsc::Sender<()>,
}

fn gated() -> (Box<Probe>, Gate) {
    let (arrived, arrivals) = mpsc::channel();
    let (leave, leaves) = mpsc::channel();
    let probe = Probe {
        memory: Memory::new(),
        arrived,
        leave: Some(leaves),
        applies: 0,
        after: Box::new(|_| Ok(())),
    };
    (Box::new(probe), Gate { arrived: arrivals, leave })
}

fn failing(disk: &Disk, after: impl FnMut(u32) -> io::Result<()> + Send + 'static) -> Box<Probe> {
    Box::new(Probe {
        memory: Memory::open(disk),
        arrived: mpsc::channel().0,
        leave: None,
        applies: 0,
        after: Box::new(after),
    })
}

#[tokio::test]
async fn what_waits_is_merged_in_order() {
    let (engine, gate) = gated();
    let writer = StateWriter::start(engine, 0, never_by_itself()).unwrap();
    writer.send(1, batch(&[("a", "1")])).await.unwrap();
    assert_eq!(gate.arrived.recv().unwrap(), 1);
    writer.send(2, batch(&[("a", "2"), ("b", "2")])).await.unwrap();
    writer.send(3, batch(&[("a", "3")])).await.unwrap();
    let mut remove = Batch::default();
    remove.remove("b");
    writer.send(4, remove).await.unwrap();
    gate.leave.send(()).unwrap();
    assert_eq!(gate.arrived.recv().unwrap(), 4);
    gate.leave.send(()).unwrap();
    assert_eq!(writer.flush().await.unwrap(), 4);
    let engine = writer.close().await.unwrap();
    assert_eq!(engine.get(b"a").unwrap().unwrap(), b"3");
    assert_eq!(engine.get(b"b").unwrap(), None);
}

#[tokio::test]
async fn a_merged_batch_has_a_limit() {
    let (engine, gate) = gated();
    let options = WriterOptions { merge_bytes: 250, ..never_by_itself() };
    let writer = StateWriter::start(engine, 0, options).unwrap();
    for index in 1..=5 {
        writer.send(index, batch(&[("key", "value")])).await.unwrap();
        if index == 1 {
            gate.arrived.recv().unwrap();
        }
    }
    (0..3).for_each(|_| gate.leave.send(()).unwrap());
    writer.flush().await.unwrap();
    // Each weighs 136: the second brings the sum above the limit.
    assert_eq!(gate.arrived.try_iter().collect::<Vec<_>>(), [2, 2]);
}

#[tokio::test]
async fn a_key_written_after_it_was_garbage_stays() {
    let (engine, gate) = gated();
    let writer = StateWriter::start(engine, 0, never_by_itself()).unwrap();
    writer.send(1, batch(&[("key", "old")])).await.unwrap();
    gate.arrived.recv().unwrap();
    let garbage = Batch { garbage: vec![b"key".to_vec()], ..Batch::default() };
    writer.send(2, garbage).await.unwrap();
    writer.send(3, batch(&[("key", "new")])).await.unwrap();
    (0..3).for_each(|_| gate.leave.send(()).unwrap());
    let engine = writer.close().await.unwrap();
    assert_eq!(engine.get(b"key").unwrap().unwrap(), b"new");
}

#[tokio::test]
async fn the_durable_index_is_never_ahead_of_a_flush() {
    for flush_bytes in [1, 1000, 5000] {
        let memory = Memory::new();
        let disk = memory.disk();
        let options = WriterOptions { flush_bytes, merge_bytes: 400, ..never_by_itself() };
        let writer = StateWriter::start(Box::new(memory), 0, options).unwrap();
        for index in 1..=100 {
            writer.send(index, twins(index)).await.unwrap();
        }
        let durable = *writer.durable().borrow();
        // Takes the disk away, as a power cut would.
        assert!(twins_on(&disk) >= durable);
    }
}

#[tokio::test]
async fn a_lone_change_becomes_durable_without_being_asked() {
    let memory = Memory::new();
    let disk = memory.disk();
    let options =
        WriterOptions { flush_interval: Duration::from_millis(5), ..WriterOptions::default() };
    let writer = StateWriter::start(Box::new(memory), 41, options).unwrap();
    let mut durable = writer.durable();
    assert_eq!(*durable.borrow_and_update(), 41);
    writer.send(42, twins(42)).await.unwrap();
    assert_eq!(*durable.wait_for(|index| *index > 41).await.unwrap(), 42);
    assert_eq!(twins_on(&disk), 42);
}

#[tokio::test]
async fn sending_waits_for_room_and_the_applied_batch_gives_it_back() {
    let (engine, gate) = gated();
    let options = WriterOptions { queue_bytes: 300, merge_bytes: 1, ..never_by_itself() };
    let writer = StateWriter::start(engine, 0, options).unwrap();
    writer.send(1, batch(&[("key", "value")])).await.unwrap();
    writer.send(2, batch(&[("key", "value")])).await.unwrap();
    gate.arrived.recv().unwrap();
    let wait = Duration::from_millis(30);
    let full = tokio::time::timeout(wait, writer.send(3, batch(&[("key", "value")]))).await;
    assert!(full.is_err(), "the queue is full");
    gate.leave.send(()).unwrap();
    writer.send(3, batch(&[("key", "value")])).await.unwrap();
    (0..2).for_each(|_| gate.leave.send(()).unwrap());
    writer.flush().await.unwrap();
    // Larger than the whole queue: alone, but possible.
    gate.leave.send(()).unwrap();
    writer.send(4, batch(&[("key", &"v".repeat(1000))])).await.unwrap();
    assert_eq!(writer.flush().await.unwrap(), 4);
}

#[tokio::test]
async fn the_first_error_is_reported_by_every_call_and_nothing_more_is_written() {
    let panics = |applies| if applies == 3 { panic!("not today") } else { Ok(()) };
    let fails =
        |applies| if applies == 3 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) };
    for (kind, panicking) in [(io::ErrorKind::Other, true), (io::ErrorKind::StorageFull, false)] {
        let disk = Disk::default();
        let engine = if panicking { failing(&disk, panics) } else { failing(&disk, fails) };
        let writer = StateWriter::start(engine, 0, never_by_itself()).unwrap();
        let mut fault = writer.fault();
        for index in 1..=2 {
            writer.send(index, twins(index)).await.unwrap();
            writer.flush().await.unwrap();
        }
        writer.send(3, twins(3)).await.unwrap();
        assert_eq!(writer.flush().await.unwrap_err().kind(), kind);
        let told = fault.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!(told.kind, kind);
        assert!(!panicking || told.message.contains("not today"));
        assert_eq!(writer.send(4, twins(4)).await.unwrap_err().kind(), kind);
        assert_eq!(writer.inspect(|_| ()).await.unwrap_err().kind(), kind);
        let other = Box::new(Memory::new());
        assert_eq!(writer.replace(other, 9).await.err().unwrap().kind(), kind);
        assert_eq!(*writer.durable().borrow(), 2);
        assert_eq!(writer.close().await.err().unwrap().kind(), kind);
        assert_eq!(twins_on(&disk), 2);
    }
}

#[tokio::test]
async fn a_sender_that_waits_for_room_learns_of_the_fault() {
    let (mut engine, gate) = gated();
    engine.after = Box::new(|_| Err(io::ErrorKind::StorageFull.into()));
    let options = WriterOptions { queue_bytes: 100, ..never_by_itself() };
    let writer = StateWriter::start(engine, 0, options).unwrap();
    writer.send(1, twins(1)).await.unwrap();
    let release = async { gate.leave.send(()).unwrap() };
    let (waited, ()) = tokio::join!(writer.send(2, twins(2)), release);
    assert_eq!(waited.unwrap_err().kind(), io::ErrorKind::StorageFull);
}

#[tokio::test]
async fn an_index_that_goes_back_is_a_fault() {
    let writer = StateWriter::start(Box::new(Memory::new()), 7, never_by_itself()).unwrap();
    writer.send(7, twins(7)).await.unwrap();
    writer.send(6, twins(6)).await.unwrap();
    assert_eq!(writer.flush().await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_replacement_takes_what_is_sent_after_it() {
    let writer = StateWriter::start(Box::new(Memory::new()), 0, never_by_itself()).unwrap();
    writer.send(1, batch(&[("before", "1")])).await.unwrap();
    let mut snapshot = Memory::new();
    let disk = snapshot.disk();
    snapshot.apply(twins(50)).unwrap();
    let old = writer.replace(Box::new(snapshot), 50).await.unwrap();
    assert!(old.get(b"before").unwrap().is_some());
    assert_eq!(*writer.durable().borrow(), 50);
    writer.send(51, twins(51)).await.unwrap();
    let new = writer.close().await.unwrap();
    assert_eq!(new.get(b"before").unwrap(), None);
    assert_eq!(twins_on(&disk), 51);
}

#[tokio::test]
async fn an_inspection_sees_all_that_was_sent_before() {
    let writer = StateWriter::start(Box::new(Memory::new()), 0, never_by_itself()).unwrap();
    for index in 1..=20_u64 {
        writer.send(index, twins(index)).await.unwrap();
        let seen = writer.inspect(|engine| engine.get(b"first").unwrap()).await.unwrap();
        assert_eq!(seen.unwrap(), index.to_be_bytes());
    }
    assert_eq!(*writer.durable().borrow(), 0);
}

#[tokio::test]
async fn a_dropped_handle_leaves_nothing_unwritten() {
    let (engine, gate) = gated();
    let disk = engine.memory.disk();
    let writer = StateWriter::start(engine, 0, never_by_itself()).unwrap();
    let mut durable = writer.durable();
    for index in 1..=3 {
        writer.send(index, twins(index)).await.unwrap();
    }
    drop(writer);
    (0..3).for_each(|_| gate.leave.send(()).unwrap());
    // The sender of the index goes with the thread.
    while durable.changed().await.is_ok() {}
    assert_eq!(twins_on(&disk), 3);
}

#[tokio::test]
async fn inline_everything_is_done_when_the_call_returns() {
    let memory = Memory::new();
    let disk = memory.disk();
    let options = WriterOptions { flush_bytes: 500, ..WriterOptions::default() };
    let writer = StateWriter::start_inline(Box::new(memory), 0, options);
    let mut durable = Vec::new();
    for index in 1..=6 {
        writer.send(index, twins(index)).await.unwrap();
        durable.push(*writer.durable().borrow());
    }
    assert_eq!(durable, [0, 0, 3, 3, 3, 6]);
    writer.send(7, twins(7)).await.unwrap();
    writer.close().await.unwrap();
    assert_eq!(twins_on(&disk), 7);
}
