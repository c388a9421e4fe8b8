//! Who makes a call: passwords, the tokens that are given out for them, and what is asked of the
//! replicated tables ([`Auth`]) in a caller's name.
//!
//! A token is `RANDOM.INDEX`. The member that checked the password makes RANDOM and proposes an
//! entry with its SHA-256; every member that applies the entry keeps that, in memory alone, with the
//! user's name. INDEX is an entry by which it is known: a member that lags behind waits for it. Each
//! member forgets a token that was not used there for as long as `--auth-token-ttl` says, all tokens
//! when it starts, and those of a user whose password has changed or who is gone. Who comes with a
//! forgotten token is told so, and logs in again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use super::{Applied, Failure, Node, locked};
use crate::clock::{Clock, Entropy};
use crate::machine::{
    Access, Auth, AuthChange, AuthRefusal, Command, Machine, PasswordHash, Principal, Rejection,
    Right, Txn,
};
use crate::raft::snapshot::blocking;
use crate::types::LeaseId;

/// Tokens that a member keeps. One more takes the place of the one that would end first.
const MOST_TOKENS: usize = 100_000;
/// A token that is used again sooner keeps the end it has.
const USED_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Passwords that wait to be hashed or checked, each of which takes a core for a tenth of a second.
/// With more, callers are told that there are too many requests.
const MOST_WAITING: usize = 1_000;
/// How often a password is checked anew because users or roles have changed meanwhile, and how often
/// a command is proposed anew for the same reason.
const ATTEMPTS: usize = 5;
/// bcrypt looks at no more.
const LONGEST_PASSWORD_BYTES: usize = 72;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthSettings {
    /// An unused token is forgotten after this time.
    pub token_ttl: Duration,
    pub bcrypt_cost: u32,
}

impl Default for AuthSettings {
    fn default() -> AuthSettings {
        AuthSettings { token_ttl: Duration::from_secs(300), bcrypt_cost: 10 }
    }
}

/// Why nobody is logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoginFailure {
    /// No such user, or another password.
    Wrong,
    /// The user has no password.
    Passwordless,
    Failed(Failure),
}

/// Why a password is not hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordFailure {
    TooLong { most_bytes: usize },
    Failed(Failure),
}

type TokenHash = [u8; 32];

fn hash_token(random: &str) -> TokenHash {
    Sha256::digest(random.as_bytes()).into()
}

/// A token as it was found here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    user: String,
    /// On this member's monotonic clock.
    ends_at: Duration,
}

/// Known by their hashes, so that neither memory nor the time of a search tells one.
#[derive(Debug, Default)]
struct Tokens {
    by_hash: BTreeMap<TokenHash, Token>,
    by_end: BTreeSet<(Duration, TokenHash)>,
}

impl Tokens {
    fn insert(&mut self, hash: TokenHash, user: String, now: Duration, ends_at: Duration) {
        self.remove(&hash);
        while let Some((end, oldest)) = self.by_end.first().copied()
            && (end <= now || self.by_hash.len() >= MOST_TOKENS)
        {
            self.remove(&oldest);
        }
        self.by_end.insert((ends_at, hash));
        self.by_hash.insert(hash, Token { user, ends_at });
    }

    fn remove(&mut self, hash: &TokenHash) {
        if let Some(token) = self.by_hash.remove(hash) {
            self.by_end.remove(&(token.ends_at, *hash));
        }
    }

    /// The user of a token, which is good for another `ttl` from `now` on.
    fn use_token(&mut self, hash: &TokenHash, now: Duration, ttl: Duration) -> Option<String> {
        let token = self.by_hash.get_mut(hash).filter(|token| token.ends_at > now)?;
        let user = token.user.clone();
        let ends_at = now + ttl;
        if ends_at.saturating_sub(token.ends_at) >= USED_AGAIN_AFTER.min(ttl / 4) {
            self.by_end.remove(&(token.ends_at, *hash));
            token.ends_at = ends_at;
            self.by_end.insert((ends_at, *hash));
        }
        Some(user)
    }

    fn forget_user(&mut self, user: &str) {
        let of_user = self.by_hash.iter().filter(|(_, token)| token.user == user);
        let hashes: Vec<TokenHash> = of_user.map(|(hash, _)| *hash).collect();
        hashes.iter().for_each(|hash| self.remove(hash));
    }
}

/// What the applier tells of users and roles, for those who do not lock the machine, and the tokens
/// known here.
pub struct AuthState {
    settings: AuthSettings,
    clock: Arc<dyn Clock>,
    /// Of the table, for the many calls of a cluster that does not ask who they are.
    enabled: AtomicBool,
    table: ArcSwap<Auth>,
    tokens: Mutex<Tokens>,
    /// Passwords that are hashed at a time: the other cores are for the other work.
    hashing: Semaphore,
    hashing_or_waiting: Semaphore,
}

impl AuthState {
    pub fn new(settings: AuthSettings, clock: Arc<dyn Clock>, machine: &Machine) -> AuthState {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        AuthState {
            settings,
            clock,
            enabled: AtomicBool::new(machine.auth().is_enabled()),
            table: ArcSwap::new(machine.auth().clone()),
            tokens: Mutex::default(),
            hashing: Semaphore::new((cores / 2).max(1)),
            hashing_or_waiting: Semaphore::new(MOST_WAITING),
        }
    }

    fn publish(&self, machine: &Machine) {
        self.table.store(machine.auth().clone());
        self.enabled.store(machine.auth().is_enabled(), Ordering::Release);
    }

    /// An entry has made this change, or has found that a token may be given out.
    pub fn on_change(&self, machine: &Machine, change: &AuthChange) {
        self.publish(machine);
        let mut tokens = locked(&self.tokens);
        match change {
            AuthChange::Authenticate { user, token_sha256, auth_revision: _ } => {
                let now = self.clock.monotonic();
                let ends_at = now + self.settings.token_ttl;
                tokens.insert(*token_sha256, user.clone(), now, ends_at);
            }
            AuthChange::UserDelete { name } | AuthChange::UserChangePassword { name, .. } => {
                tokens.forget_user(name);
            }
            AuthChange::Disable => *tokens = Tokens::default(),
            _ => {}
        }
    }

    /// A snapshot took the place of entries: whose tokens are void now is not known.
    pub fn on_installed(&self, machine: &Machine) {
        self.publish(machine);
        *locked(&self.tokens) = Tokens::default();
    }

    fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }
}

/// Who makes a call, by the tables of one moment.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// `None` while nobody is asked.
    auth: Option<Arc<Auth>>,
    session: Option<Session>,
}

/// A caller that has logged in.
#[derive(Debug, Clone)]
struct Session {
    principal: Principal,
    token: TokenHash,
}

impl Caller {
    fn principal(&self) -> Option<&Principal> {
        self.session.as_ref().map(|session| &session.principal)
    }

    /// The user's name; `None` for one who has not said it, and while nobody is asked.
    pub fn user(&self) -> Option<&str> {
        match self.principal() {
            Some(Principal::User { name, .. }) => Some(name),
            Some(Principal::Server) | None => None,
        }
    }

    /// What the caller may do with keys.
    ///
    /// # Errors
    ///
    /// [`AuthRefusal::UserEmpty`] for one who had to say who it is.
    pub fn access(&self) -> Result<Access<'_>, Failure> {
        match &self.auth {
            None => Ok(Access::UNLIMITED),
            Some(auth) => Ok(auth.access(self.principal())?),
        }
    }

    /// The right to everything in a transaction that only reads. As in etcd, anybody may make one
    /// that asks for nothing.
    pub fn check_reads(&self, txn: &Txn) -> Result<(), Failure> {
        let asks = [txn.success.is_empty(), txn.failure.is_empty(), txn.compares.is_empty()];
        if asks == [true; 3] { Ok(()) } else { Ok(self.access()?.read_txn(txn)?) }
    }

    /// Refuses callers that are nobody.
    pub fn check_user(&self) -> Result<(), Failure> {
        self.auth.as_ref().map_or(Ok(()), |auth| Ok(auth.check_user(self.principal())?))
    }

    /// Refuses all but those that may administer the cluster.
    pub fn check_admin(&self) -> Result<(), Failure> {
        self.auth.as_ref().map_or(Ok(()), |auth| Ok(auth.check_admin(self.principal())?))
    }
}

impl Node {
    /// Whether callers have to say who they are, as far as it is known here.
    pub fn asks_who(&self) -> bool {
        self.shared.auth.is_enabled()
    }

    /// Users and roles, as applied here.
    pub fn auth(&self) -> Arc<Auth> {
        self.shared.auth.table.load_full()
    }

    /// Who comes with `token`. Waits a moment for a token that is not known here yet.
    ///
    /// # Errors
    ///
    /// [`Failure::InvalidToken`] while authentication is on.
    pub async fn caller(&self, token: Option<&str>) -> Result<Caller, Failure> {
        if !self.asks_who() {
            return Ok(Caller::default());
        }
        self.await_token(token).await;
        self.caller_now(token)
    }

    /// Waits until this member can know `token`, for an election timeout at most.
    pub async fn await_token(&self, token: Option<&str>) {
        let index = token.and_then(|token| token.rsplit_once('.')?.1.parse().ok());
        if let Some(index) = index
            && self.asks_who()
            && index > self.applied_index()
        {
            // Whether it came in time shows when the token is looked for.
            let applied = self.applied_up_to(index);
            let _ = tokio::time::timeout(self.limits.election_timeout, applied).await;
        }
    }

    /// [`Node::caller`] that waits for nothing.
    pub fn caller_now(&self, token: Option<&str>) -> Result<Caller, Failure> {
        if !self.asks_who() {
            return Ok(Caller::default());
        }
        match token.filter(|token| !token.is_empty()) {
            None => Ok(self.caller_with(None)?),
            Some(token) => {
                let random = token.rsplit_once('.').ok_or(Failure::InvalidToken)?.0;
                self.caller_with(Some(hash_token(random)))
            }
        }
    }

    fn caller_with(&self, token: Option<TokenHash>) -> Result<Caller, Failure> {
        // Before the token is looked for: a user that has come to its name later is another one.
        let auth = self.auth();
        if !auth.is_enabled() {
            return Ok(Caller::default());
        }
        let Some(token) = token else { return Ok(Caller { auth: Some(auth), session: None }) };
        let state = &self.shared.auth;
        let (now, ttl) = (self.clock.monotonic(), state.settings.token_ttl);
        let user = locked(&state.tokens).use_token(&token, now, ttl);
        let name = user.ok_or(Failure::InvalidToken)?;
        let principal = Principal::User { name, auth_revision: auth.revision() };
        Ok(Caller { auth: Some(auth), session: Some(Session { principal, token }) })
    }

    /// What was read in the caller's name may be told only if users and roles are still as they were
    /// when its rights were checked.
    pub fn check_unchanged(&self, caller: &Caller) -> Result<(), Failure> {
        let unchanged = match &caller.auth {
            None => return if self.asks_who() { Err(outdated()) } else { Ok(()) },
            Some(auth) => auth.revision() == self.shared.auth.table.load().revision(),
        };
        if unchanged { Ok(()) } else { Err(outdated()) }
    }

    /// The right to every key on a lease, as it is here.
    pub fn check_lease(&self, caller: &Caller, right: Right, id: LeaseId) -> Result<(), Failure> {
        if caller.auth.is_none() {
            return Ok(());
        }
        Ok(caller.access()?.lease(right, self.machine().leases(), id)?)
    }

    /// [`Node::propose`] in the name of a client. When users or roles change on the way, the caller
    /// is looked at anew: what was refused for that alone has changed nothing.
    pub async fn propose_for(&self, caller: Caller, command: Command) -> Result<Applied, Failure> {
        let Some(mut session) = caller.session else { return self.propose(None, command).await };
        for _ in 1..ATTEMPTS {
            match self.propose(Some(session.principal), command.clone()).await {
                Err(failure) if failure == outdated() => {}
                other => return other,
            }
            match self.caller_with(Some(session.token))?.session {
                Some(now) => session = now,
                None => return self.propose(None, command).await,
            }
        }
        self.propose(Some(session.principal), command).await
    }

    /// [`Node::propose_for`] that waits however long it takes.
    pub async fn propose_patiently_for(
        &self,
        caller: &Caller,
        command: Command,
    ) -> Result<Applied, Failure> {
        let mut principal = caller.principal().cloned();
        for _ in 1..ATTEMPTS {
            match self.propose_patiently(principal.clone(), command.clone()).await {
                Err(failure) if failure == outdated() => {}
                other => return other,
            }
            let Some(session) = &caller.session else { break };
            principal = self.caller_with(Some(session.token))?.principal().cloned();
        }
        self.propose_patiently(principal, command).await
    }

    /// Gives out a token to a user who knows the password.
    pub async fn log_in(&self, name: &str, password: String) -> Result<String, LoginFailure> {
        let failed = LoginFailure::Failed;
        let password: Arc<str> = password.into();
        for _ in 0..ATTEMPTS {
            self.read_barrier().await.map_err(failed)?;
            let auth = self.auth();
            if !auth.is_enabled() {
                return Err(failed(Rejection::from(AuthRefusal::Disabled).into()));
            }
            let hash = match auth.user(name).map(|user| user.password_hash.clone()) {
                Some(None) => return Err(LoginFailure::Passwordless),
                Some(Some(hash)) => Some(hash),
                None => None,
            };
            if !self.fits(password.clone(), hash).await.map_err(failed)? {
                return Err(LoginFailure::Wrong);
            }
            let random = || self.entropy.random_u64();
            let random = format!("{:016x}{:016x}", random(), random());
            let proof = AuthChange::Authenticate {
                user: name.to_owned(),
                token_sha256: hash_token(&random),
                auth_revision: auth.revision(),
            };
            match self.propose(Some(Principal::Server), Command::Auth(proof)).await {
                Ok(_) => return Ok(format!("{random}.{}", self.applied_index())),
                Err(failure) if failure == outdated() => {}
                Err(failure) => return Err(failed(failure)),
            }
        }
        Err(failed(outdated()))
    }

    /// Whether the password is the one behind `hash`. Without a user it takes as long to find that
    /// it is not.
    async fn fits(&self, password: Arc<str>, hash: Option<PasswordHash>) -> Result<bool, Failure> {
        let cost = self.shared.auth.settings.bcrypt_cost;
        self.away_from_runtime(move || match hash {
            // Text that is no hash fits nothing.
            Some(hash) => bcrypt::verify(password.as_bytes(), &hash.0).unwrap_or(false),
            None => {
                let _ = bcrypt::hash_with_salt(password.as_bytes(), cost, [0; 16]);
                false
            }
        })
        .await
    }

    /// What is to be kept of a new password.
    pub async fn hash_password(&self, password: String) -> Result<PasswordHash, PasswordFailure> {
        if password.len() > LONGEST_PASSWORD_BYTES {
            return Err(PasswordFailure::TooLong { most_bytes: LONGEST_PASSWORD_BYTES });
        }
        let cost = self.shared.auth.settings.bcrypt_cost;
        let salt = salt(self.entropy.as_ref());
        let hashed = self.away_from_runtime(move || {
            let hash = bcrypt::hash_with_salt(password.as_bytes(), cost, salt);
            // As etcd writes it.
            hash.map(|hash| hash.format_for_version(bcrypt::Version::TwoA))
        });
        let hash = hashed.await.map_err(PasswordFailure::Failed)?;
        Ok(PasswordHash(hash.expect("the cost is one that bcrypt has")))
    }

    async fn away_from_runtime<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let state = &self.shared.auth;
        let Ok(_place) = state.hashing_or_waiting.try_acquire() else {
            return Err(Failure::TooManyRequests);
        };
        let turn = async { state.hashing.acquire().await.map_err(|_| Failure::Stopping) };
        let _turn = self.patiently(turn).await?;
        blocking(false, move || Ok(work())).await.map_err(|_| Failure::Stopping)
    }
}

fn outdated() -> Failure {
    Rejection::from(AuthRefusal::OldRevision).into()
}

fn salt(entropy: &dyn Entropy) -> [u8; 16] {
    let mut salt = [0; 16];
    for half in salt.chunks_exact_mut(8) {
        half.copy_from_slice(&entropy.random_u64().to_le_bytes());
    }
    salt
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(300);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn hash(number: usize) -> TokenHash {
        hash_token(&number.to_string())
    }

    #[test]
    fn a_token_lives_as_long_as_it_is_used() {
        let mut tokens = Tokens::default();
        tokens.insert(hash(1), "alice".into(), seconds(0), TTL);
        assert_eq!(tokens.use_token(&hash(1), seconds(299), TTL).as_deref(), Some("alice"));
        assert_eq!(tokens.use_token(&hash(1), seconds(598), TTL).as_deref(), Some("alice"));
        assert_eq!(tokens.use_token(&hash(2), seconds(598), TTL), None);
        assert_eq!(tokens.use_token(&hash(1), seconds(898), TTL), None);
        // It goes when the next one comes.
        tokens.insert(hash(2), "bob".into(), seconds(900), seconds(1_200));
        assert_eq!((tokens.by_hash.len(), tokens.by_end.len()), (1, 1));
    }

    #[test]
    fn a_users_tokens_are_forgotten_together_and_no_others() {
        let mut tokens = Tokens::default();
        for (number, user) in [(1, "alice"), (2, "bob"), (3, "alice")] {
            tokens.insert(hash(number), user.into(), seconds(0), TTL);
        }
        tokens.forget_user("alice");
        let user = |tokens: &mut Tokens, number| tokens.use_token(&hash(number), seconds(1), TTL);
        assert_eq!(user(&mut tokens, 1), None);
        assert_eq!(user(&mut tokens, 2).as_deref(), Some("bob"));
        assert_eq!(user(&mut tokens, 3), None);
        assert_eq!(tokens.by_end.len(), 1);
    }

    #[test]
    fn tokens_are_bounded_and_the_oldest_make_room() {
        let mut tokens = Tokens::default();
        for number in 0..MOST_TOKENS + 2 {
            let now = Duration::from_millis(number as u64);
            tokens.insert(hash(number), "alice".into(), now, now + TTL);
        }
        assert_eq!((tokens.by_hash.len(), tokens.by_end.len()), (MOST_TOKENS, MOST_TOKENS));
        let now = Duration::from_millis(MOST_TOKENS as u64);
        assert_eq!(tokens.use_token(&hash(1), now, TTL), None);
        assert!(tokens.use_token(&hash(2), now, TTL).is_some());
    }
}
