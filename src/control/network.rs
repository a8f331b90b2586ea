//! Requests to the network stack of a sandbox. What they say is read by the parsers of the options, and what they do is done
//! with the rights of this process, as the options are; a change is made wholly or not at all.

use netstack::{
    Control, Error, FlowState, HostLoopback, PortId, Protocol, Publish, PublishedPort, Rate, Rates,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::{Commanded, Kind, Refusal, Request};
use crate::host::ports;
use crate::spec::parse::{self, port_ranges};
use crate::spec::{LoopbackSpec, RateSpec, SpecError};

/// Flows, or ports, in one answer.
const MAX_PAGE: usize = 1_000;
/// Ports published by one request.
const MAX_PUBLISHED: usize = 1_024;

/// The requests there are.
const REQUESTS: [&str; 9] =
    ["stats", "flows", "ports", "publish", "unpublish", "rules", "set-rules", "rates", "set-rates"];

/// A stack that runs.
pub(crate) struct Network(pub(crate) Control);

impl Commanded for Network {
    fn obey(&mut self, request: &Request) -> Result<Value, Refusal> {
        match request.name.as_str() {
            "stats" => self.stats(&request.arguments()?),
            "flows" => self.flows(&request.arguments()?),
            "ports" => self.ports(&request.arguments()?),
            "publish" => self.publish(&request.arguments()?),
            "unpublish" => self.unpublish(&request.arguments()?),
            "rules" => self.rules(&request.arguments()?),
            "set-rules" => self.set_rules(request.arguments()?),
            "rates" => self.rates(&request.arguments()?),
            "set-rates" => self.set_rates(&request.arguments()?),
            _ => Err(Refusal::unknown(request, &REQUESTS)),
        }
    }
}

/// No arguments.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// A part of a list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    /// Leave out so many flows; ports up to this one.
    #[serde(default)]
    after: u64,
    #[serde(default = "Page::usual")]
    limit: usize,
}

impl Page {
    fn usual() -> usize {
        MAX_PAGE
    }

    fn check(&self) -> Result<(), Refusal> {
        if (1..=MAX_PAGE).contains(&self.limit) {
            return Ok(());
        }
        Err(Refusal::new(Kind::Invalid, format!("limit: it is 1 to {MAX_PAGE}")))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Publishing {
    /// As `-p` has it.
    ports: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unpublishing {
    port: u64,
}

/// Rules; those that are not there stay.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRules {
    allow: Option<Vec<String>>,
    deny: Option<Vec<String>>,
    /// As `--allow-host-loopback` has it, or `none`.
    host_loopback: Option<String>,
}

/// Rates as `--network-rate` has them; null takes one away, one that is not there stays.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRates {
    #[serde(default, rename = "in", deserialize_with = "present")]
    inwards: Option<Option<String>>,
    #[serde(default, rename = "out", deserialize_with = "present")]
    outwards: Option<Option<String>>,
}

/// What is there is `Some`, null included.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// As in the network log.
#[derive(Serialize)]
struct Flow {
    protocol: &'static str,
    direction: &'static str,
    inside: String,
    outside: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    sent_bytes: u64,
    sent_packets: u64,
    received_bytes: u64,
    received_packets: u64,
    seconds: f64,
}

impl From<FlowState> for Flow {
    fn from(flow: FlowState) -> Self {
        Self {
            protocol: flow.transport.name(),
            direction: if flow.inbound { "in" } else { "out" },
            inside: flow.guest.to_string(),
            outside: flow.remote.to_string(),
            name: flow.name,
            sent_bytes: flow.sent.bytes,
            sent_packets: flow.sent.packets,
            received_bytes: flow.received.bytes,
            received_packets: flow.received.packets,
            seconds: flow.lasted.as_secs_f64(),
        }
    }
}

#[derive(Serialize)]
struct Port {
    port: u64,
    protocol: &'static str,
    host: Vec<String>,
    inside_port: u16,
}

impl From<&PublishedPort> for Port {
    fn from(port: &PublishedPort) -> Self {
        Self {
            port: port.id.0,
            protocol: if port.asked.protocol == Protocol::Udp { "udp" } else { "tcp" },
            host: port.addresses.iter().map(ToString::to_string).collect(),
            inside_port: port.asked.inside_port,
        }
    }
}

#[derive(Serialize)]
struct RateNow {
    bytes_per_second: u64,
    burst: Option<u64>,
}

impl From<Rate> for RateNow {
    fn from(Rate { bytes_per_second, burst }: Rate) -> Self {
        Self { bytes_per_second, burst }
    }
}

fn failed(error: &Error) -> Refusal {
    let mut refusal = Refusal::of(Kind::Failed, error);
    if let Error::Listen { addr, protocol, source } = error
        && source.kind() == std::io::ErrorKind::AddrInUse
        && let Some(holder) = ports::holder(*addr, *protocol == Protocol::Udp)
    {
        refusal = refusal.cause(holder.to_string());
    }
    refusal
}

fn invalid(error: &SpecError) -> Refusal {
    Refusal::of(Kind::Invalid, error)
}

impl Network {
    fn stats(&self, Nothing {}: &Nothing) -> Result<Value, Refusal> {
        let stats = self.0.stats();
        Ok(Value::Object(stats.named().map(|(name, count)| (name.to_owned(), count.into())).collect()))
    }

    fn flows(&self, page: &Page) -> Result<Value, Refusal> {
        page.check()?;
        let after = usize::try_from(page.after).unwrap_or(usize::MAX);
        // One more says whether there are more.
        let found = self.0.flows_after(after, page.limit + 1).map_err(|error| failed(&error))?;
        let next = (found.len() > page.limit).then(|| page.after + u64::try_from(page.limit).unwrap_or(0));
        let flows: Vec<Flow> = found.into_iter().take(page.limit).map(Flow::from).collect();
        Ok(list("flows", json!(flows), next))
    }

    fn ports(&self, page: &Page) -> Result<Value, Refusal> {
        page.check()?;
        let all = self.0.published().map_err(|error| failed(&error))?;
        let mut rest = all.iter().filter(|port| port.id.0 > page.after);
        let ports: Vec<Port> = rest.by_ref().take(page.limit).map(Port::from).collect();
        let next = rest.next().and_then(|_| ports.last()).map(|last| last.port);
        Ok(list("ports", json!(ports), next))
    }

    fn publish(&self, wanted: &Publishing) -> Result<Value, Refusal> {
        let ports = parse::publish(&wanted.ports).map_err(|error| invalid(&error))?;
        if ports.len() > MAX_PUBLISHED {
            let text = format!("ports: {MAX_PUBLISHED} at most are published by one request");
            return Err(Refusal::new(Kind::Invalid, text));
        }
        let ports: Vec<Publish> = ports.iter().map(Publish::from).collect();
        let published = self.0.publish_all(&ports).map_err(|error| failed(&error))?;
        let ports: Vec<Port> = published.iter().map(Port::from).collect();
        Ok(list("ports", json!(ports), None))
    }

    fn unpublish(&self, wanted: &Unpublishing) -> Result<Value, Refusal> {
        match self.0.unpublish(PortId(wanted.port)).map_err(|error| failed(&error))? {
            Some(port) => Ok(json!({ "ports": [Port::from(&port)] })),
            None => Err(Refusal::new(Kind::NotFound, format!("there is no published port {}", wanted.port))),
        }
    }

    fn rules(&self, Nothing {}: &Nothing) -> Result<Value, Refusal> {
        let policy = self.0.policy().map_err(|error| failed(&error))?;
        let texts = |rules: &[netstack::Rule]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
        let host_loopback = match &policy.host_loopback {
            HostLoopback::Refused => "none".to_owned(),
            HostLoopback::All => "all".to_owned(),
            HostLoopback::Ports(ports) => port_ranges(ports).join(","),
        };
        Ok(json!({
            "allow": texts(&policy.allow), "deny": texts(&policy.deny), "host_loopback": host_loopback
        }))
    }

    /// Nobody else changes them between reading and writing: all requests come to this one thread.
    fn set_rules(&self, wanted: NewRules) -> Result<Value, Refusal> {
        let rules = |texts: Option<Vec<String>>, parse: fn(&str) -> Result<netstack::Rule, SpecError>| {
            let parsed =
                texts.map(|texts| texts.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>());
            parsed.transpose().map_err(|error| invalid(&error))
        };
        let allow = rules(wanted.allow, parse::allow)?;
        let deny = rules(wanted.deny, parse::deny)?;
        let host_loopback = match wanted.host_loopback.as_deref() {
            None => None,
            Some("none") => Some(LoopbackSpec::Refused),
            Some(text) => Some(parse::host_loopback(text).map_err(|error| invalid(&error))?),
        };
        let mut policy = self.0.policy().map_err(|error| failed(&error))?;
        policy.allow = allow.unwrap_or(policy.allow);
        policy.deny = deny.unwrap_or(policy.deny);
        policy.host_loopback = host_loopback.map_or(policy.host_loopback, HostLoopback::from);
        self.0.set_policy(policy).map_err(|error| failed(&error))?;
        self.rules(&Nothing {})
    }

    fn rates(&self, Nothing {}: &Nothing) -> Result<Value, Refusal> {
        let Rates { sent, received } = self.0.rates().map_err(|error| failed(&error))?;
        Ok(json!({ "in": received.map(RateNow::from), "out": sent.map(RateNow::from) }))
    }

    fn set_rates(&self, wanted: &NewRates) -> Result<Value, Refusal> {
        let rate = |way: &str, text: &Option<Option<String>>| match text {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(text)) => {
                let [inwards, outwards] = parse::network_rate(&format!("{way}:{text}"))?;
                Ok(Some(inwards.or(outwards).map(|rate: RateSpec| Rate::from(rate))))
            }
        };
        let received = rate("in", &wanted.inwards).map_err(|error| invalid(&error))?;
        let sent = rate("out", &wanted.outwards).map_err(|error| invalid(&error))?;
        let mut rates = self.0.rates().map_err(|error| failed(&error))?;
        rates.received = received.unwrap_or(rates.received);
        rates.sent = sent.unwrap_or(rates.sent);
        self.0.set_rates(rates).map_err(|error| failed(&error))?;
        self.rates(&Nothing {})
    }
}

/// A part of a list, and what to ask for after it.
fn list(name: &str, entries: Value, next: Option<u64>) -> Value {
    let mut answer = json!({ name: entries });
    if let (Some(next), Some(answer)) = (next, answer.as_object_mut()) {
        answer.insert("next".into(), next.into());
    }
    answer
}
