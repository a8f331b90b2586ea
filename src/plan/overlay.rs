//! The root of a plan in the words of the overlay crate.

use fsoverlay::{Branch, Generated, GeneratedNode, LayerSpec, OverlaySpec, Owners, UpperSpec};

use super::{GeneratedPlan, IdPlan, LayerPlan, RootPlan};
use crate::spec::IdExtent;

impl RootPlan {
    /// What the overlay is opened with, for a run and for listing its changes afterwards.
    #[must_use]
    pub fn overlay_spec(&self, ids: &IdPlan, workers: usize) -> OverlaySpec {
        let extents = |map: &[IdExtent]| {
            map.iter()
                .map(|e| fsoverlay::IdExtent { inside: e.inside, outside: e.outside, count: e.count })
                .collect::<Vec<_>>()
        };
        let layer = |layer: &LayerPlan| LayerSpec {
            dir: layer.host_path.clone(),
            owners: if layer.translate_owners {
                Owners::Translated { uids: extents(&ids.uids), gids: extents(&ids.gids) }
            } else {
                Owners::Numeric
            },
            branch: if layer.whiteouts { Branch::Whiteouts } else { Branch::ReadOnly },
            hidden: layer.hidden.clone(),
            ..LayerSpec::default()
        };
        let generated = |object: &GeneratedPlan| Generated {
            path: object.path.clone(),
            mode: object.mode,
            node: match &object.content {
                Some(content) => GeneratedNode::File(content.clone().into_bytes()),
                None => GeneratedNode::Dir,
            },
        };
        OverlaySpec {
            layers: self.layers.iter().map(layer).collect(),
            generated: self.generated.iter().map(generated).collect(),
            upper: self.upper.as_ref().map(|u| UpperSpec {
                dir: u.dir.clone(),
                work: u.work.clone(),
                ..UpperSpec::default()
            }),
            squash: ids.single(),
            workers,
            ..OverlaySpec::default()
        }
    }
}
